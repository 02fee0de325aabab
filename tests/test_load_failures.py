"""Loads that fail though every byte is right: whose fault it is, and what to do."""

from __future__ import annotations

import io
import pickle
import re
import sys
import tracemalloc
import types
import warnings
import zipfile
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.serialization import safe_globals

import asyncckpt
from asyncckpt import Checkpointer, CorruptCheckpointError, UnloadableStateError, UnsafeStateError
from support import run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


# These leave it to the file where its storages go.
PLACES_OF_THE_FILE: tuple[Any, ...] = (None, lambda *_: None)


class Config:
    def __init__(self, value: Any = None) -> None:
        self.value = value


class Failing:
    """Its own code raises when it is loaded."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise state["error"]


class Keeping:
    """Loads another file while it is loaded, and keeps the error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        with pytest.raises(RuntimeError):
            asyncckpt.load(state["path"], map_location="nowhere")
        raise ValueError("and this is another one")


def write(path: Path, data_pickle: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Write a file with right checksums around a pickle, as torch.save would."""
    writer: Any = torch._C.PyTorchFileWriter(str(path))
    records = {"data.pkl": data_pickle, "byteorder": b"little"}
    for name, content in (records | dict(storages or {})).items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


def saved(path: Path, state: Any) -> Path:
    asyncckpt.save(state, path).committed.result()
    return path


def pickled(state: Any) -> bytes:
    """Return the data.pkl of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


def test_what_is_refused_is_named_with_its_path_and_the_remedy(tmp_path: Path) -> None:
    state = {"x": torch.ones(1), "conf": [Config(deque([1]))], "best": np.float64(0.5)}
    path = saved(tmp_path / "a.pt", state)
    with pytest.raises(UnsafeStateError) as caught:
        asyncckpt.load(path)
    assert re.fullmatch(
        re.escape(str(path)) + r": weights_only=True refuses"
        r' state\["conf"\]\[0\] \(test_load_failures\.Config, collections\.deque, whose items cannot be'
        r" allowed\);"
        r' state\["best"\] \(numpy\S+\.scalar, numpy\.dtype\);'
        r" if you trust the file, load it with weights_only=False, or allow these names with"
        r" torch\.serialization\.add_safe_globals",
        str(caught.value),
    )
    assert isinstance(caught.value, pickle.UnpicklingError)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert asyncckpt.load(path, weights_only=False)["best"] == 0.5


def test_checkpointer_load_and_restore_say_it_too(tmp_path: Path) -> None:
    live: dict[str, Any] = {"x": torch.zeros(1), "conf": None}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(1), "conf": Config()})
        for read in (lambda: checkpointer.load(1), lambda: checkpointer.restore(live)):
            with pytest.raises(UnsafeStateError, match=r'00001\.pt: .* state\["conf"\] \(test_load_failures'):
                read()
    assert live == {"x": torch.zeros(1), "conf": None}


@pytest.mark.parametrize(
    ("state", "protocol", "reason"),
    [
        ({"n": 1 << 3000}, 2, "Unsupported operand 139"),
        ({"n": torch.ones(1)}, 4, "Unsupported operand 149"),
    ],
)
def test_torchs_own_reason_is_given_where_no_name_is_refused(
    tmp_path: Path, state: Any, protocol: int, reason: str
) -> None:
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsafeStateError, match=rf"a\.pt: weights_only=True refuses it: {reason}; if you"):
            asyncckpt.load(tmp_path / "a.pt")


def test_what_is_refused_costs_no_more_memory_than_the_file_however_much_its_pickle_asks_for(
    tmp_path: Path,
) -> None:
    # A name that is refused, then a bytearray of 2 GiB of which one byte is there.
    data = b"\x80\x05cforeign\nName\n)R\x96" + (2 << 30).to_bytes(8, "little") + b"x."
    path = write(tmp_path / "a.pt", data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracemalloc.start()
        try:
            with pytest.raises(UnsafeStateError, match=r"a\.pt: weights_only=True refuses it: "):
                asyncckpt.load(path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 256 << 20


def test_objects_that_hold_each_other_twice_are_told_by_path_in_a_set_too(tmp_path: Path) -> None:
    # Each level is in the next one twice: its text would double with each of them.
    data = b"\x80\x02cforeign\nName\n)Rq\x02"
    data += b"0cforeign\nName\nh\x02h\x02\x86Rq\x02" * 40
    data += b"0}X\x01\x00\x00\x00ac__builtin__\nset\n](h\x02cforeign\nOther\n)Re\x85Rs."
    path = write(tmp_path / "a.pt", data)
    with pytest.raises(UnsafeStateError, match=r'refuses state\["a"\]\S* \(foreign\.Name'):
        asyncckpt.load(path)


def test_what_has_to_be_imported_first_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", b"\x80\x02ctorch.distributed.tensor\nDTensor\n.")
    # Another test may have imported it in this process.
    script = """
        import sys, asyncckpt
        try:
            asyncckpt.load(sys.argv[1])
        except asyncckpt.UnsafeStateError as error:
            print(error)
    """
    _, output, _ = run_python(script, str(path))
    assert re.search(
        r"refuses state \(torch\.distributed\.tensor\.DTensor\):"
        r" ``torch\.distributed\.tensor`` must be imported to load DTensors; if you trust the file",
        output,
    )


def test_a_class_that_is_gone_is_told_by_name(tmp_path: Path) -> None:
    module: Any = types.ModuleType("gone_module")
    exec("class Net: pass", vars(module))
    sys.modules["gone_module"] = module
    try:
        path = saved(tmp_path / "a.pt", {"net": module.Net()})
        del module.Net
        with pytest.raises(
            UnloadableStateError, match=r"Can't get attribute 'Net'.*they need gone_module\.Net"
        ):
            asyncckpt.load(path, weights_only=False)
    finally:
        del sys.modules["gone_module"]
    with pytest.raises(UnloadableStateError, match=r"No module named 'gone_module'") as caught:
        asyncckpt.load(path, weights_only=False)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyError("k"), MemoryError(), EOFError(), OSError("disk")]
)
def test_what_an_objects_own_code_raises_is_no_damage_of_the_file(tmp_path: Path, error: Exception) -> None:
    path = saved(tmp_path / "a.pt", {"x": Failing(error)})
    with pytest.raises(UnloadableStateError, match=rf"rebuilt \({type(error).__name__}: ") as caught:
        asyncckpt.load(path, weights_only=False)
    assert type(caught.value.__cause__) is type(error)


def test_what_an_allowed_objects_own_code_raises_is_no_damage_either(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", pickled({"x": Config(5)}).replace(b"Config", b"Failing"))
    with safe_globals([Failing]), pytest.raises(UnloadableStateError, match="KeyError: 'error'"):
        asyncckpt.load(path)


def test_an_interruption_is_not_translated(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": Failing(KeyboardInterrupt())})
    with pytest.raises(KeyboardInterrupt):
        asyncckpt.load(path, weights_only=False)


def test_an_error_of_a_device_or_of_map_location_passes_through(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"x": torch.ones(3)})

    def failing(*_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match=r"^don't know how to restore data location .*nowhere"):
        asyncckpt.load(path, map_location="nowhere")
    with pytest.raises(RuntimeError, match="nowhere"):
        asyncckpt.load(path, map_location={"cpu": "nowhere"})
    with pytest.raises(ZeroDivisionError):
        asyncckpt.load(path, map_location=failing)
    if not torch.cuda.is_available():
        for location in ("cuda", torch.device("cuda:1")):
            with pytest.raises(RuntimeError, match=r"^Attempting to deserialize object on a CUDA device"):
                asyncckpt.load(path, map_location=location)
        write(
            path,
            pickled({"x": torch.ones(3)}).replace(b"\x03\0\0\0cpu", b"\x04\0\0\0cuda"),
            {"data/0": bytes(12)},
        )
        for place in PLACES_OF_THE_FILE:
            with pytest.raises(RuntimeError, match=r"^Attempting to deserialize object on a CUDA device"):
                asyncckpt.load(path, map_location=place)


def test_an_error_with_a_device_in_another_file_is_not_taken_for_one_of_this_file(tmp_path: Path) -> None:
    other = saved(tmp_path / "other.pt", {"x": torch.ones(3)})
    path = saved(tmp_path / "a.pt", {"x": Keeping(other)})
    with pytest.raises(UnloadableStateError, match=r"a\.pt: .*and this is another one"):
        asyncckpt.load(path, weights_only=False)


def test_a_device_that_torch_does_not_know_is_told(tmp_path: Path) -> None:
    data = pickled({"x": torch.ones(3)}).replace(b"\x03\0\0\0cpu", b"\x03\0\0\0abc")
    path = write(tmp_path / "a.pt", data, {"data/0": torch.ones(3).numpy().tobytes()})
    for location in PLACES_OF_THE_FILE:
        with pytest.raises(UnloadableStateError, match=r'a\.pt: it has tensors on "abc".*map_location="cpu"'):
            asyncckpt.load(path, map_location=location)
    assert asyncckpt.load(path, map_location="cpu")["x"].tolist() == [1, 1, 1]


def test_a_warning_that_is_an_error_passes_through(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt", pickle_protocol=3)
    with pytest.raises(UserWarning, match="Detected pickle protocol 3"):
        asyncckpt.load(tmp_path / "a.pt")


def test_a_lack_of_memory_passes_through(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.pt", {"x": Failing(RuntimeError("you tried to allocate 12 bytes")), "y": torch.ones(3)}
    )
    with pytest.raises(RuntimeError, match=r"^you tried to allocate 12 bytes"):
        asyncckpt.load(path, weights_only=False)


STORAGE = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
NONSENSE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no pickle": lambda: b"hello",
    "cut off": lambda: pickled({"a": torch.ones(2)})[:-3],
    "taken from an empty stack": lambda: b"\x80\x02\x85.",
    "an unknown reference": lambda: b"\x80\x02h\x05.",
    "a text that is no UTF-8": lambda: b"\x80\x02X\x01\0\0\0\xff.",
    "a cut number": lambda: b"\x80\x02J\x01",
    "a call of a number": lambda: b"\x80\x02K\x01)R.",
    "wrong arguments": lambda: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01\x85R.",
    "a class called with what it refuses": lambda: b"\x80\x02cbuiltins\nset\nK\x01\x85R.",
    "an absurd size": lambda: b"\x80\x02cbuiltins\nbytearray\n\x8a\x07" + b"\xff" * 6 + b"\x7f\x85R.",
    "an absurd storage": lambda: (
        b"\x80\x02" + STORAGE + b"\x8a\x07" + b"\xff" * 6 + b"\x0ftQtctorch\nSize\n)R\x86."
    ),
    "a dict of unhashable keys": lambda: b"\x80\x02}]K\x01s.",
    "a storage that is not there": lambda: pickled({"a": torch.ones(2)}),
    "a storage of negative size": lambda: b"\x80\x02" + STORAGE + b"J\xff\xff\xff\xfftQt.",
    "a view outside of its storage": lambda: (
        pickled({"a": torch.ones(4)[1:3]})
        .replace(b"X\x01\0\0\x000", b"X\x01\0\0\x001")
        .replace(b"K\x01", b"K\x09")
    ),
    "attributes of a list": lambda: b"\x80\x02]}b.",
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE)
def test_a_pickle_that_makes_no_sense_is_told_with_the_file(
    tmp_path: Path, make: Callable[[], bytes], *, weights_only: bool
) -> None:
    path = write(tmp_path / "a.pt", make(), {"data/1": bytes(16)})
    with pytest.raises(CorruptCheckpointError, match=r"a\.pt: "):
        asyncckpt.load(path, weights_only=weights_only)


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    depth = 100_000
    path = write(tmp_path / "a.pt", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    value = asyncckpt.load(path)
    while value:
        (value,) = value
