"""The self-description of a checkpoint: a record that torch.load ignores, or bytes behind a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from platform import python_version
from typing import TYPE_CHECKING, Any

from asyncckpt._version import __version__
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
# The record is found with two small reads, so it has to stay small.
MAX_BYTES = 48 << 10


@dataclass(frozen=True, slots=True)
class Description:
    """The self-description of a file, or of a folder with the files of many ranks.

    Attributes:
        sequence: place in the order of commits of its directory, from 1; 0 for a file saved on its own.
        step: training step; None for a file saved on its own.
        metrics: by name.
        created: wall time of the snapshot, seconds since the epoch.
        versions: of the libraries that wrote it.
        filename: the template that named it; None if it is not one of a series.
        nbytes: size of all files of a folder; None for a file.
        ranks: how many ranks wrote a folder; None for a file.
        extras: size and CRC-32 of each file of a folder that is no data file, by name.
    """

    sequence: int
    step: int | None
    metrics: Mapping[str, float]
    created: float
    versions: Mapping[str, str] = field(default_factory=dict)
    filename: str | None = None
    nbytes: int | None = None
    ranks: int | None = None
    extras: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the content of the record: JSON, with NaN and the infinities as Python writes them."""
        from torch.version import __version__ as torch_version  # noqa: PLC0415 - listing does without torch

        # The build as well ("2.13.0+cu130"), which the metadata of the package does not name.
        versions = {"asyncckpt": __version__, "torch": torch_version, "python": python_version()}
        fields = {
            "format": FORMAT,
            "sequence": self.sequence,
            "step": self.step,
            "metrics": dict(self.metrics),
            "created": self.created,
            "versions": {**versions, **self.versions},
            "filename": self.filename,
        }
        of_folder: dict[str, Any] = {
            "nbytes": self.nbytes,
            "ranks": self.ranks,
            "extras": dict(self.extras) or None,
        }
        fields |= {name: value for name, value in of_folder.items() if value is not None}
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, record: bytes) -> Description:
        """Read the record of a file.

        Raises:
            CorruptCheckpointError: it is not JSON, or of a format this version does not know.
        """
        try:
            fields: dict[str, Any] = json.loads(record)
            if fields["format"] == FORMAT:
                return cls(
                    int(fields["sequence"]),
                    None if fields["step"] is None else int(fields["step"]),
                    {str(name): float(value) for name, value in fields["metrics"].items()},
                    float(fields["created"]),
                    {str(name): str(number) for name, number in fields["versions"].items()},
                    None if fields.get("filename") is None else str(fields["filename"]),
                    None if fields.get("nbytes") is None else int(fields["nbytes"]),
                    None if fields.get("ranks") is None else int(fields["ranks"]),
                    {str(name): (int(n), int(crc)) for name, (n, crc) in fields.get("extras", {}).items()},
                )
            found = fields["format"]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CorruptCheckpointError(f"its description cannot be read: {error!r}") from error
        raise CorruptCheckpointError(
            f"it has format {found}, this version reads format {FORMAT}; upgrade asyncckpt"
        )


def checkpoint_of(path: str, description: Description, nbytes: int) -> Checkpoint:
    """Return the checkpoint that a file with this description is."""
    return Checkpoint(
        description.step,
        path,
        description.metrics,
        nbytes,
        description.created,
        description.sequence,
        description.filename,
    )
