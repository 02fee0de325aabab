"""Every reader reports damage by the name of the record; truncated files are not listed."""

from __future__ import annotations

import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, CorruptCheckpointError
from asyncckpt._loading.catalog import Catalog
from asyncckpt.layout.description import MAX_BYTES, Description
from asyncckpt.stores.local import LocalStore
from file_operations import RecordingOps
from sameness import assert_same
from support import flip, payload_offset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def sample(names: int = 4) -> dict[str, Any]:
    state = {f"weight {i}": torch.arange(i * 40, dtype=torch.float64) for i in range(names)}
    return {"model": state, "step": 12345, "big": torch.arange(9000)}


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, sample(), metrics={"loss": 1.0})
        checkpointer.wait()
        yield checkpointer


@pytest.fixture
def path(checkpointer: Checkpointer) -> Path:
    return only_file(checkpointer)


def only_file(checkpointer: Checkpointer) -> Path:
    checkpointer.wait()
    (found,) = Path(checkpointer.directory).iterdir()
    return found


def readers(checkpointer: Checkpointer, path: Path) -> list[Callable[[], Any]]:
    """Return all ways to read a checkpoint whole."""
    live = sample()
    return [
        lambda: checkpointer.verify(str(path)),
        lambda: checkpointer.load(str(path)),
        lambda: asyncckpt.load(path),
        lambda: checkpointer.restore(live, str(path)),
    ]


RECORDS = [
    "data.pkl",
    "data/0",
    "data/1",
    "data/4",
    "version",
    "byteorder",
    ".format_version",
    ".asyncckpt.json",
]
RECORDS += [".data/serialization_id", ".storage_alignment"]


@pytest.mark.parametrize("record", RECORDS)
def test_the_error_of_a_flipped_bit_names_the_record(
    checkpointer: Checkpointer, path: Path, record: str
) -> None:
    offset = payload_offset(path, record)
    with zipfile.ZipFile(path) as file:
        size = file.getinfo(f"archive/{record}").file_size
    if not size:
        pytest.skip("an empty record has no bit to flip")
    for at in {0, size // 2, size - 1}:
        flip(path, offset + at, bit=at % 8)
        for read in readers(checkpointer, path):
            with pytest.raises(CorruptCheckpointError, match=rf"archive/{record}\b") as caught:
                read()
            assert str(path) in str(caught.value)
            assert isinstance(caught.value, ValueError)
        flip(path, offset + at, bit=at % 8)
    checkpointer.verify(str(path))


def test_a_damaged_checkpoint_changes_nothing_in_the_live_state(
    checkpointer: Checkpointer, path: Path
) -> None:
    live: dict[str, Any] = {
        "model": {k: torch.zeros_like(v) for k, v in sample()["model"].items()},
        "step": 0,
        "big": torch.ones(9000),
    }
    flip(path, payload_offset(path, "data/4") + 70_000)
    with pytest.raises(CorruptCheckpointError):
        checkpointer.restore(live)
    assert live["step"] == 0
    assert torch.equal(live["big"], torch.ones(9000))


def test_no_flipped_bit_gives_wrong_values(tmp_path: Path) -> None:
    # Also in headers and the directory: what load returns is right, what verify passes is right for
    # torch.load as well, and a listing never fails.
    state = {"none": torch.arange(0.0), "some": torch.arange(40), "step": 12345}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        path = only_file(checkpointer)
        payload = payload_offset(path, "data/1")
        chosen, believed = random.Random(3), []
        # A third of all bytes, to be quick.
        places = [*range(payload + 10), *range(payload + 310, path.stat().st_size)]
        for at in chosen.sample(places, len(places) // 3):
            bit = chosen.randrange(8)
            flip(path, at, bit)
            for what, read in _beliefs(checkpointer, path, state).items():
                try:
                    read()
                except CorruptCheckpointError:
                    pass
                except Exception as error:  # noqa: BLE001 - to be told of all at once
                    believed.append((at, bit, what, type(error).__name__))
            flip(path, at, bit)
        assert believed == []


def _beliefs(checkpointer: Checkpointer, path: Path, state: Any) -> dict[str, Callable[[], None]]:
    def load() -> None:
        assert_same(checkpointer.load(str(path)), state)

    def verify() -> None:
        checkpointer.verify(str(path))
        assert_same(torch.load(path), state)

    def listing() -> None:
        assert [(c.step, c.sequence) for c in checkpointer.checkpoints()] in ([(1, 1)], [])

    return {"load": load, "verify": verify, "checkpoints": listing}


def test_a_cut_file_is_no_checkpoint_wherever_it_is_cut(checkpointer: Checkpointer, path: Path) -> None:
    content = path.read_bytes()
    lengths = {0, 1, 21, 22, 23, 30, 64, len(content) - 1, len(content) - 22, len(content) - 23}
    lengths |= {random.Random(5).randrange(len(content)) for _ in range(150)}
    for length in sorted(lengths):
        path.write_bytes(content[:length])
        assert checkpointer.checkpoints() == []
        for read in readers(checkpointer, path)[:3]:
            with pytest.raises(CorruptCheckpointError, match="step-00000001"):
                read()


@pytest.mark.parametrize("content", [b"", b"PK", b"hello" * 1000, b"\0" * 5000, b"PK\x05\x06" + b"\0" * 18])
def test_a_file_of_another_format_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.checkpoints() == []
        for read in readers(checkpointer, tmp_path / "a.pt")[:3]:
            with pytest.raises(CorruptCheckpointError, match=r"a\.pt"):
                read()


def test_a_zip_that_is_compressed_or_holds_no_pickle_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"x" * 1000)
    with zipfile.ZipFile(tmp_path / "text.pt", "w") as file:
        file.writestr("a.txt", b"x" * 1000)
    for name in ("packed.pt", "text.pt"):
        with pytest.raises(CorruptCheckpointError, match=name):
            asyncckpt.load(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_pickle_damaged_before_its_checksum_was_made_raises_only_errors_of_ours(tmp_path: Path) -> None:
    state = sample(3) | {
        "ordered": OrderedDict(a=1),
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [1.5, 1j, {1, 2}, (True, None), b"bytes", bytearray(b"b"), 1 << 70, "text"],
    }
    torch.save(state, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    chosen, raised = random.Random(9), set()
    for _ in range(400):
        damaged = _damage(records["data.pkl"], chosen)
        writer: Any = torch._C.PyTorchFileWriter(str(tmp_path / "a.pt"))
        for name, content in (records | {"data.pkl": damaged}).items():
            if name not in {"version", ".data/serialization_id"}:  # which the writer adds
                writer.write_record(name, content, len(content))
        writer.write_end_of_file()
        try:
            asyncckpt.load(tmp_path / "a.pt")
        except asyncckpt.AsyncCkptError as error:
            raised.add(type(error))
            assert str(tmp_path / "a.pt") in str(error)  # noqa: PT017 - not each of them raises
    assert CorruptCheckpointError in raised


def _damage(content: bytes, chosen: random.Random) -> bytes:
    """Change, drop or repeat a few bytes."""
    damaged = bytearray(content)
    for _ in range(chosen.randint(1, 3)):
        at, length = chosen.randrange(len(damaged)), chosen.randint(1, 8)
        change = chosen.randrange(3)
        if change == 0:
            damaged[at] = chosen.randrange(256)
        elif change == 1:
            del damaged[at : at + length]
        else:
            damaged[at:at] = damaged[at : at + length]
    return bytes(damaged)


@pytest.mark.parametrize("entries", [1, 300, 5000])
async def test_a_description_is_read_in_two_small_reads(tmp_path: Path, entries: int) -> None:
    metrics = {f"metric number {i}": i / 7 for i in range(MAX_BYTES // 60)}
    description = Description(1, 1, metrics, 1.0).encode()
    assert MAX_BYTES // 2 < len(description) <= MAX_BYTES
    with Checkpointer(tmp_path) as checkpointer:
        save = checkpointer.save(1, {str(i): torch.zeros(1) for i in range(entries)}, metrics=metrics)
        await save
    ops = _ReadSizes()
    (found,) = await Catalog(LocalStore(str(tmp_path), ops)).entries()
    assert found.checkpoint is not None
    assert found.checkpoint.metrics == metrics
    assert 1 <= len(ops.lengths) <= 2
    assert max(ops.lengths) <= 64 << 10


class _ReadSizes(RecordingOps):
    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def preadv(self, fd: int, into: memoryview, offset: int) -> int:
        self.lengths.append(len(into))
        return super().preadv(fd, into, offset)


async def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(3):
            checkpointer.save(step, {"a": torch.zeros(1)})
    ops = _ReadSizes()
    catalog = Catalog(LocalStore(str(tmp_path), ops))
    first = await catalog.entries()
    reads = len(ops.lengths)
    assert await catalog.entries() == first
    assert len(ops.lengths) == reads == 3


def test_metrics_too_large_for_a_small_read_are_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="the metrics take more than"):
            checkpointer.save(1, {}, metrics={str(i): 0.1 for i in range(10_000)})
        checkpointer.save(1, {})
        checkpointer.wait()
        assert checkpointer.latest() is not None


def test_a_newer_format_is_refused() -> None:
    record = Description(1, 1, {}, 1.0).encode().replace(b'"format": 1', b'"format": 9')
    with pytest.raises(CorruptCheckpointError, match="format 9, this version reads format 1; upgrade"):
        Description.decode(record)
