"""The plain data that the floors hand to each other: no torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Offsets = npt.NDArray[np.int64]


# The classes under which torch's file format names storages, each for a dtype.
STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One committed checkpoint.

    Attributes:
        step: the step given to `save`; None for a file saved without one.
        path: where it is, a local path or a URL.
        metrics: the metrics given to `save`.
        nbytes: size of the file in bytes.
        created: wall time of the snapshot, seconds since the epoch.
        sequence: its place in the order of commits of its directory, from 1.
        filename: the template of the series that it belongs to; None if the file does not tell.
    """

    step: int | None
    path: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    nbytes: int = 0
    created: float = 0.0
    sequence: int = 0
    filename: str | None = None


@dataclass(slots=True)
class SaveStats:
    """What one save cost, in seconds and bytes; each figure is filled in as it becomes known.

    Attributes:
        stall: what the training thread lost: the call of `save`, from entry to return.
        wait: of that, for an earlier save to make room.
        freeze: of that, deciding what the file will hold.
        copy: of that, copying tensors to host memory.
        checksum, write: in the background, and overlapping: CRC-32, and from the first write to the last.
        sync: making the bytes durable.
        commit: from the last byte written to the durable name, `sync` included.
        durable: from the call of `save` to the durable name.
        nbytes: size of the file.
        queue_depth: operations that were before this one in the engine's line.
    """

    stall: float = 0.0
    wait: float = 0.0
    freeze: float = 0.0
    copy: float = 0.0
    checksum: float = 0.0
    write: float = 0.0
    sync: float = 0.0
    commit: float = 0.0
    durable: float = 0.0
    nbytes: int = 0
    queue_depth: int = 0
