"""Which names in a file keep torch.load from loading it as plain weights."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def refused_globals(names: Sequence[str]) -> list[str]:
    """Return which of these names `torch.load(weights_only=True)` refuses, in the same order.

    Args:
        names: of classes, functions and constants, such as `posix.system`.
    """
    told = [name for name in names if _is_tellable(name)]
    refused = set(_refused(told)).union(set(names).difference(told))
    # torch may report a name as what it is called today: those that it seems to allow are asked for alone.
    refused.update(name for name in told if name not in refused and _refused([name]))
    return [name for name in names if name in refused]


def _is_tellable(name: str) -> bool:
    """Whether a name fits the opcode that torch knows; no name that it allows is otherwise."""
    return name.isascii() and "\n" not in name


def _refused(names: Sequence[str]) -> list[str]:
    """Ask torch about a file that names them and nothing else."""
    from torch.serialization import get_unsafe_globals_in_checkpoint  # noqa: PLC0415

    globals_ = b"".join(b"c%b\n%b\n" % (module, name) for module, name in map(_split, names))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02(" + globals_ + b"t.")
        archive.writestr("archive/version", b"3\n")
    file.seek(0)
    return get_unsafe_globals_in_checkpoint(file)


def _split(name: str) -> tuple[bytes, bytes]:
    module, _, qualname = name.rpartition(".")
    return module.encode(), qualname.encode()
