"""What a file tells: who wrote it, how far the training was, and where the bytes of its storages are."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import time
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import torch

import asyncckpt
from asyncckpt import Checkpoint, Checkpointer, CorruptCheckpointError
from asyncckpt._inspection.contents import Contents, Summary, read_contents, summarize
from asyncckpt._saving.engine import get_engine
from asyncckpt.layout.torch_zip import lay_out, plan
from asyncckpt.layout.zip_format import CENTRAL
from asyncckpt.stores import open_store
from asyncckpt.stores.local import LocalStore
from strangers import data_pickle, pickled_text, write_file

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from asyncckpt.stores.base import OpenFile, Store

places = count()


async def _told(read: Callable[[OpenFile], Awaitable[Any]], store: Store, name: str) -> Any:
    async with store.open(name) as file:
        return await read(file)


def told(path: Path, store: Store | None = None) -> tuple[Summary, Contents]:
    """Return both that is told of a file, of which one is a part of the other but for files of asyncckpt."""
    store = store or open_store(path.parent)
    call = get_engine().call
    return call(_told, summarize, store, path.name), call(_told, read_contents, store, path.name)


def summary(state: object, tmp_path: Path) -> Summary:
    """Return the summary of a file by torch.save."""
    torch.save(state, tmp_path / "x.pt")
    brief, contents = told(tmp_path / "x.pt")
    assert brief == contents.summary
    return brief


STATE: dict[str, Any] = {
    "model": {"w": torch.arange(6.0), "b": torch.arange(3, dtype=torch.int16)},
    "empty": torch.empty(0),
    "half": torch.arange(5).to(torch.float8_e4m3fn),
}


def test_a_checkpoint_tells_what_was_given_to_save(tmp_path: Path) -> None:
    began = time.time()
    with Checkpointer(tmp_path) as ckpt:
        for step in (3, 7):
            ckpt.save(step, {**STATE, "epoch": 2, "step": 99}, metrics={"val_loss": 0.25})
    brief, contents = told(tmp_path / "step-00000007.pt")
    nbytes = (tmp_path / "step-00000007.pt").stat().st_size
    path = str(tmp_path / "step-00000007.pt")
    created = brief.checkpoint.created
    assert began <= created <= time.time()
    assert brief == Summary(
        Checkpoint(7, path, {"val_loss": 0.25}, nbytes, created, 2, "step-{step:08d}.pt"), "asyncckpt"
    )
    assert contents.summary.epoch == 2  # which a listing does not read the state for
    assert contents.versions.keys() == {"asyncckpt", "torch", "python"}
    assert contents.records.byteorder == "little"


@pytest.mark.parametrize("save", [torch.save, asyncckpt.save])
@pytest.mark.parametrize("place", ["{}", "memory://contents-{}"])
def test_payloads_are_where_they_are_told_to_be(
    save: Callable[[object, Any], object], place: str, tmp_path: Path
) -> None:
    local = tmp_path / "x.pt"
    save(STATE, local)
    asyncckpt.wait()
    data = local.read_bytes()
    store = open_store(place.format(tmp_path if place == "{}" else next(places)))
    if place != "{}":
        fsspec.filesystem("memory").pipe_file(store.path_of("x.pt"), data)
    brief, contents = told(local, store)
    assert brief.writer == contents.summary.writer == ("torch" if save is torch.save else "asyncckpt")
    assert brief.checkpoint.path == store.path_of("x.pt")
    tensors = {path[-1]: tensor for path, tensor in contents.tensors}
    for name, tensor in (STATE["model"] | {"empty": STATE["empty"], "half": STATE["half"]}).items():
        start, stop = contents.records.payloads[tensors[name].storage.key]
        assert data[start:stop] == tensor.view(torch.uint8).numpy().tobytes()
    assert len(contents.records.payloads) == 4


class CountingStore(LocalStore):
    """Notes how much is read."""

    nbytes = 0

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[OpenFile]:
        async with super().open(name) as file:
            read = file.read

            async def counted(offset: int, into: memoryview) -> None:
                self.nbytes += into.nbytes
                await read(offset, into)

            file.read = counted  # type: ignore[method-assign]
            yield file


def test_only_little_is_read(tmp_path: Path) -> None:
    large = {"w": torch.zeros(5_000_000), "loss": torch.tensor(1.0)}
    torch.save(large, tmp_path / "a.pt")
    asyncckpt.save(large, tmp_path / "b.pt")
    asyncckpt.wait()
    for name in ("a.pt", "b.pt"):
        store = CountingStore(str(tmp_path))
        assert told(tmp_path / name, store)[0].checkpoint.metrics == {"loss": 1.0}
        assert store.nbytes < 1_000_000


def test_a_listing_leaves_large_pickles_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"step": 5, "array": np.zeros(10_000)}, tmp_path / "x.pt")
    assert told(tmp_path / "x.pt")[0].checkpoint.step == 5
    monkeypatch.setattr("asyncckpt._inspection.contents.MAX_SUMMARY", 50_000)
    brief, contents = told(tmp_path / "x.pt")
    assert (brief.checkpoint.step, brief.writer) == (None, "torch")
    assert contents.summary.checkpoint.step == 5


def test_a_checkpoint_with_a_step_is_listed_without_its_state(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"array": np.zeros(200_000)})
    store = CountingStore(str(tmp_path))
    get_engine().call(_told, summarize, store, "step-00000001.pt")
    assert store.nbytes < 200_000


@pytest.mark.parametrize(
    ("state", "step", "epoch", "metrics"),
    [
        ({"step": 3, "epoch": 1}, 3, 1, {}),
        ({"iteration": 4, "loss": 0.5}, 4, None, {"loss": 0.5}),
        ({"step": 1, "global_step": 9}, 9, None, {}),
        ({"step": torch.tensor(3), "epoch": True}, None, None, {}),
        ({"step": 1 << 100, "loss": float("inf")}, None, None, {"loss": float("inf")}),
        ({"val_loss": torch.tensor([2.5]), "acc": torch.tensor(7), "best-acc": 1}, None, None,
         {"val_loss": 2.5, "acc": 7, "best-acc": 1}),
        ({"loss": torch.tensor(1.5, dtype=torch.bfloat16)}, None, None, {"loss": 1.5}),
        ({"loss": torch.tensor(1j), "loss_fn": "mse", "accumulate": 4, "glossy": 1.0}, None, None, {}),
        ({"metrics": {"f1": 0.5, "name": "x", "n": 3, 4: 1.0}}, None, None, {"f1": 0.5, "n": 3}),
        ({f"loss.{n}": 1.0 for n in range(1_000)}, None, None, {}),
        ([1, 2], None, None, {}),
        (torch.ones(3), None, None, {}),
    ],
)  # fmt: skip
def test_states_tell_by_their_names(
    state: object, step: int | None, epoch: int | None, metrics: dict[str, float], tmp_path: Path
) -> None:
    found = summary(state, tmp_path)
    checkpoint = found.checkpoint
    assert (found.writer, checkpoint.step, found.epoch) == ("torch", step, epoch)
    assert repr(dict(checkpoint.metrics)) == repr({name: float(value) for name, value in metrics.items()})
    assert (checkpoint.created, checkpoint.sequence) == (0.0, 0)


def test_lightning_tells_its_monitored_score(tmp_path: Path) -> None:
    state = {
        "pytorch-lightning_version": "2.6.0",
        "epoch": 3,
        "global_step": 120,
        "loss": 7.0,
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_loss'}": {
                "monitor": "val_loss",
                "current_score": torch.tensor(0.125),
            },
            "ModelCheckpoint{'monitor': 'acc'}": {"monitor": "acc", "current_score": 0.75},
            "ModelCheckpoint{'monitor': None}": {"monitor": None, "current_score": None},
            "EarlyStopping": {"wait_count": 0},
        },
        "state_dict": STATE["model"],
    }
    found = summary(state, tmp_path)
    assert (found.writer, found.checkpoint.step, found.epoch) == ("lightning", 120, 3)
    assert found.checkpoint.metrics == {"val_loss": 0.125, "acc": 0.75}
    assert told(tmp_path / "x.pt")[1].versions == {"lightning": "2.6.0"}
    assert summary({**state, "callbacks": [1]}, tmp_path).checkpoint.metrics == {}


def test_a_file_by_asyncckpt_without_a_directory_tells_from_its_state(tmp_path: Path) -> None:
    description = {"format": 1, "sequence": 0, "step": 8, "metrics": {}, "created": 5.0, "versions": {}}
    pickled = pickle.dumps({"epoch": 2, "step": 1, "val_loss": 0.5}, 2)
    _write_described(tmp_path / "x.pt", pickled, description)
    brief, contents = told(tmp_path / "x.pt")
    assert brief == contents.summary
    assert (brief.writer, brief.checkpoint.step, brief.epoch) == ("asyncckpt", 8, 2)
    assert brief.checkpoint.metrics == {"val_loss": 0.5}


def _write_described(path: Path, data_pickle: bytes, description: dict[str, Any]) -> None:
    made = plan(lay_out([]), data_pickle, json.dumps(description).encode())
    path.write_bytes(b"".join(data for _, data in made.literals) + made.tail)


def test_values_of_another_byte_order_are_not_told(tmp_path: Path) -> None:
    torch.save({"loss": torch.tensor(1.0), "acc": 0.5}, tmp_path / "x.pt")
    pickled = _record(tmp_path / "x.pt", "data.pkl")
    write_file(tmp_path / "big.pt", pickled, b"\x3f\x80\0\0", byteorder="big")
    brief, contents = told(tmp_path / "big.pt")
    assert brief.checkpoint.metrics == {"acc": 0.5}
    assert contents.records.byteorder == "big"


def _record(path: Path, name: str) -> bytes:
    reader: Any = torch._C.PyTorchFileReader(str(path))
    data: bytes = reader.get_record(name)
    return data


def _legacy(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _saved_by(save: Callable[..., object], *given: object) -> bytes:
    file = io.BytesIO()
    save(file, *given)
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "meaning"),
    [
        (b"", "empty"),
        (b"x", "too few for a checkpoint"),
        (b"hello world" * 100, "does not end as a zip file does"),
        (_legacy({"a": torch.ones(2)}), r"before 1\.6: read it with torch\.load"),
        (pickle.dumps({"a": 1}), "plain pickle"),
        (gzip.compress(b"a" * 1_000, mtime=0), "gzip: decompress"),
        (_tar(), "tar archive: unpack"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 file: read it with h5py"),
        ((20).to_bytes(8, "little") + b'{"a":{}}' + bytes(40), "safetensors"),
        (_saved_by(np.save, np.ones(3)), r"numpy\.load"),
        (_saved_by(np.savez, np.ones(3)), r"no record arr_0\.npy/data\.pkl"),
        (_saved_by(np.savez_compressed, np.ones(3)), "compressed records"),
        (b"PK\x03\x04" + bytes(100), "cut off"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # not all bytes are always the same
)
def test_other_files_are_named(data: bytes, meaning: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    for read in (summarize, read_contents):
        with pytest.raises(CorruptCheckpointError, match=rf"x\.pt: it .*{meaning}"):
            get_engine().call(_told, read, open_store(tmp_path), "x.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CorruptCheckpointError, match=r"x\.pt: it is a TorchScript archive.*torch\.jit\.load"):
        told(path)


def test_a_file_that_is_cut_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(STATE, path)
    data = path.read_bytes()
    for end in range(0, len(data), 97):
        path.write_bytes(data[:end])
        with pytest.raises(CorruptCheckpointError, match=r"x\.pt: "):
            told(path)


def test_a_record_that_is_not_where_it_should_be_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(STATE, path)
    data = bytearray(path.read_bytes())
    extra = data.index(b"x/data.pkl") - 2  # the length of the header's last field
    data[extra] += 8
    path.write_bytes(data)
    with pytest.raises(
        CorruptCheckpointError, match=r"record x/data\.pkl does not end where its payload begins"
    ):
        told(path)


def test_a_record_far_behind_its_header_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1 << 18)}, path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"x/data/0") - CENTRAL.size
    data[entry + 20 : entry + 28] = (8).to_bytes(4, "little") * 2  # its size, which is told twice
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"record x/data/0 does not fit its place"):
        told(path)
    with pytest.raises(CorruptCheckpointError, match=r"record x/data/0 does not fit its place"):
        asyncckpt.load(path)


def test_a_record_that_is_larger_than_it_could_be_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = data_pickle({"step": 5})
    write_file(tmp_path / "x.pt", pickled, byteorder="little" * 3)
    with pytest.raises(CorruptCheckpointError, match=r"record x/byteorder has 18 bytes, too many"):
        told(tmp_path / "x.pt")
    write_file(tmp_path / "x.pt", pickled)
    assert told(tmp_path / "x.pt")[0].checkpoint.step == 5
    monkeypatch.setattr("asyncckpt._inspection.contents.MAX_PICKLE", len(pickled) - 1)
    with pytest.raises(CorruptCheckpointError, match=r"record x/data\.pkl has \d+ bytes, too many"):
        told(tmp_path / "x.pt")


def test_a_description_by_a_stranger_is_read(tmp_path: Path) -> None:
    versions = {"torch": ["\x1b"], "n": 3}
    description = {
        "format": 1,
        "sequence": 1,
        "step": None,
        "metrics": {},
        "created": 1e300,
        "versions": versions,
    }
    _write_described(tmp_path / "x.pt", b"\x80\x02}" + pickled_text("step") + b"K\x05s.", description)
    brief, contents = told(tmp_path / "x.pt")
    assert (brief.writer, brief.checkpoint.step, brief.checkpoint.created) == ("asyncckpt", 5, 1e300)
    assert contents.versions == {"torch": "['\\x1b']", "n": "3"}


def test_a_metric_outside_of_the_file_is_damage(tmp_path: Path) -> None:
    torch.save({"loss": torch.ones(4)[3]}, tmp_path / "x.pt")
    write_file(tmp_path / "y.pt", _record(tmp_path / "x.pt", "data.pkl"), bytes(8))
    with pytest.raises(
        CorruptCheckpointError, match=r"y\.pt: a tensor of it views more than its storage 0 of 8"
    ):
        told(tmp_path / "y.pt")


def test_the_tensors_are_those_of_the_state(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    contents = told(tmp_path / "x.pt")[1]
    assert [(path, tensor.shape) for path, tensor in contents.tensors] == [
        (["model", "w"], (6,)),
        (["model", "b"], (3,)),
        (["empty"], (0,)),
        (["half"], (5,)),
    ]
    assert contents.records.count == 10
