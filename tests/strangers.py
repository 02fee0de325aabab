"""Files that a stranger could send, and that do something as soon as they are unpickled."""

from __future__ import annotations

import copyreg
import io
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest
    from typing_extensions import Self


def pickled_text(text: str) -> bytes:
    """Return the opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def malicious(mark: Path) -> dict[str, bytes]:
    """Return pickles, each of which makes the file `mark` when it is unpickled."""
    touch = f"touch {mark}"
    command = pickled_text(touch)
    system = b"cos\nsystem\n"
    making = f"c{__name__}\nMaking\n".encode()
    state = b"}" + pickled_text("p") + command + b"s"
    code = pickled_text(f"__import__('os').system({touch!r})")
    return {
        "REDUCE": b"\x80\x02" + system + command + b"\x85R.",
        "a name of Python 2": b"c__builtin__\neval\n(" + code + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + command + b"\x85R.",
        "BUILD": b"\x80\x02" + making + b")\x81" + state + b"b.",
        "INST": b"(" + command + b"ios\nsystem\n.",
        "OBJ": b"(" + system + command + b"o.",
        "NEWOBJ": b"\x80\x02" + making + command + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + making + b")" + state + b"\x92.",
        "EXT": b"\x80\x02\x82\xf7" + command + b"\x85R.",
        "APPENDS": b"\x80\x02" + making + b")\x81(" + command + b"e.",
        "SETITEM": b"\x80\x02" + making + b")\x81K\x01" + command + b"s.",
        "hashing a key": b"\x80\x02}" + making + b")\x81" + state + b"bK\x01s.",
        "a call that is called": b"\x80\x02cfunctools\npartial\n" + system + b"\x85R" + command + b"\x85R.",
        "numpy": b"\x80\x02cnumpy\ndtype\n" + system + command + b"\x85R\x85R.",
        "a tensor": b"\x80\x02ctorch._utils\n_rebuild_parameter\n" + system + command + b"\x85R\x88}\x87R.",
    }


class Making:
    """Makes the file that it is told of, however it is told."""

    def __new__(cls, path: str | None = None, *, p: str | None = None) -> Self:
        cls._make(path or p)
        return super().__new__(cls)

    @staticmethod
    def _make(command: str | None) -> None:
        if command is not None:
            Path(command.removeprefix("touch ")).touch()

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        self._make(state["p"])

    def __hash__(self) -> int:
        self._make(self.__dict__.get("p"))
        return 0

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setitem__(self, _: object, command: str) -> None:
        self._make(command)

    def extend(self, commands: list[str]) -> None:
        self._make(commands[0])


def register_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the extension code that one of the pickles uses stand for os.system."""
    monkeypatch.setitem(copyreg._extension_registry, ("os", "system"), 0xF7)  # type: ignore[attr-defined]
    monkeypatch.setitem(copyreg._inverted_registry, 0xF7, ("os", "system"))  # type: ignore[attr-defined]


def write_file(path: Path, data_pickle: bytes, *payloads: bytes, byteorder: str = "little") -> Path:
    """Write a file as torch.save does, with whatever `data.pkl` and storages."""
    writer: Any = torch._C.PyTorchFileWriter(str(path))
    records = {"data.pkl": data_pickle, "byteorder": byteorder.encode()}
    records |= {f"data/{key}": payload for key, payload in enumerate(payloads)}
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def data_pickle(state: object) -> bytes:
    """Return the data.pkl that torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
