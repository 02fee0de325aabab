"""Plain data that the rooms exchange: no torch, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Offsets = npt.NDArray[np.int64]


# Storage classes in torch's file format, and their dtypes.
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
        path: local path or URL of the file.
        metrics: the metrics given to `save`.
        nbytes: size of the file in bytes.
        created: wall time of the snapshot, seconds since the epoch.
        sequence: position in the order of commits of its directory, from 1; 0 for a file without one.
        filename: template of its series; None if the file has none.
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
    """Cost of one save, in seconds and bytes; complete once `committed` is done.

    Attributes:
        stall: duration of the call of `save`, which the training thread lost.
        wait: part of `stall`: waiting for an earlier save.
        agreement: part of `stall`: waiting for the other ranks of a sharded save, and planning with them.
        freeze: part of `stall`: pickling everything but the tensors' bytes.
        copy: part of `stall`: copying tensors to host memory, or cloning them on their device.
        overlapped: whether a part was copied after `save` had returned.
        reason: why `overlap=True` did not apply; empty if it did, or was not asked for.
        deferred: in the background: copying what was deferred.
        fence: what optimizers, or calls of `fence`, waited for it.
        device_fence: the same on the devices, while the host did not wait.
        deferred_bytes: what was deferred.
        spilled_bytes: part of it: cloned on the device at a fence, since it was not copied yet.
        checksum, write: in the background, overlapping: CRC-32, all threads together; from the first write
            to the end of the last.
        sync: making the bytes durable.
        commit: from the end of the last write until the name is durable, `sync` included.
        durable: from the call of `save` until the name is durable.
        nbytes: size of the file.
        queue_depth: operations that were queued before this save.
    """

    stall: float = 0.0
    wait: float = 0.0
    agreement: float = 0.0
    freeze: float = 0.0
    copy: float = 0.0
    overlapped: bool = False
    reason: str = ""
    deferred: float = 0.0
    fence: float = 0.0
    device_fence: float = 0.0
    deferred_bytes: int = 0
    spilled_bytes: int = 0
    checksum: float = 0.0
    write: float = 0.0
    sync: float = 0.0
    commit: float = 0.0
    durable: float = 0.0
    nbytes: int = 0
    queue_depth: int = 0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What asyncckpt holds in this process.

    Attributes:
        pending: queued saves, removals, links and copies, the running one included.
        threads: running threads, copy threads included.
        memory: bytes of host memory, in use and free.
        in_use: part of `memory`: snapshots that are being taken or written.
    """

    pending: int
    threads: int
    memory: int
    in_use: int
