"""Restoring folders on other numbers of ranks and other meshes, beside what stock DCP makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import asyncckpt
from process_groups import on_ranks
from programs import Interpreter
from sameness import assert_same
from sharded_models import FINDER, MODELS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SAVED = {1: ["fsdp"], 2: ["fsdp", "tp"], 4: ["fsdp", "tp", "hsdp"]}
ALL = [f"{kind}-{ranks}" for ranks, kinds in SAVED.items() for kind in kinds]

SAVE = """\
for kind in KINDS:
    model, opt = trained(kind, 1)
    states = dict(zip(("model", "opt"), get_state_dict(model, opt)))
    dcp.save({**states, "step": 7, "history": [1.5, "x"]}, checkpoint_id=f"{FOLDER}/{kind}-{ranks}")
"""

RESTORE = """\
kinds = ["fsdp"] + (["tp"] if ranks > 1 else []) + (["hsdp"] if ranks == 4 else [])
for saved in ALL:
    for kind in kinds:
        by_stock, stock_opt = trained(kind, 2)
        states = dict(zip(("model", "opt"), get_state_dict(by_stock, stock_opt)))
        dcp.load(states, checkpoint_id=f"{FOLDER}/{saved}")
        from torch.distributed.checkpoint.state_dict import set_state_dict
        set_state_dict(by_stock, stock_opt, model_state_dict=states["model"], optim_state_dict=states["opt"])
        wanted = contents(by_stock, stock_opt)

        model, opt = trained(kind, 3)
        before = contents(model, opt)
        identities = [id(p) for p in model.parameters()]
        state = {"model": model, "opt": opt, "step": 0, "history": []}
        checkpoint = finder(FOLDER).restore(state, saved)
        assert checkpoint.path.endswith(saved)
        found = contents(model, opt)
        assert not differences(found, wanted), (saved, kind, differences(found, wanted))
        assert differences(before, wanted)
        assert [id(p) for p in model.parameters()] == identities
        assert (state["step"], state["history"]) == (7, [1.5, "x"])

        fresh = model_of(kind, 4)
        fresh_opt = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1.0)
        finder(FOLDER).restore({"model": fresh, "opt": fresh_opt, "step": 0, "history": []}, saved)
        assert not differences(contents(fresh, fresh_opt), wanted), (saved, kind, "fresh")
        told.append([saved, kind])
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, interpreter: Interpreter) -> Path:
    """A directory of checkpoints that stock DCP has saved on several numbers of ranks."""
    path = tmp_path_factory.mktemp("stock")
    for ranks, kinds in SAVED.items():
        body = f"FOLDER, KINDS = {str(path)!r}, {kinds!r}\n{MODELS}{SAVE}"
        on_ranks(interpreter, tmp_path_factory.mktemp("save"), body, ranks=ranks)
    return path


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_restore_gives_what_stock_load_gives(
    interpreter: Interpreter, folder: Path, tmp_path: Path, ranks: int
) -> None:
    body = f"FOLDER, ALL = {str(folder)!r}, {ALL!r}\n{MODELS}{FINDER}{RESTORE}"
    told = on_ranks(interpreter, tmp_path, body, ranks=ranks)
    kinds = ["fsdp", "tp", "hsdp"][: {1: 1, 2: 2, 3: 2, 4: 3}[ranks]]
    assert told == [[[saved, kind] for saved in ALL for kind in kinds]] * ranks


FAIL = """\
from pathlib import Path
from torch.distributed.tensor import Shard, distribute_tensor
from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import seal
from support import flip

def sharded(tensor):
    return distribute_tensor(tensor, init_device_mesh("cpu", (ranks,)), [Shard(0)])

def step(number):
    path = Path(f"{directory}-saved/step-{number:08d}")
    dcp.save({"t": sharded(torch.full((8, 300), float(number))), "n": number}, checkpoint_id=path)
    if rank == 0:
        mark = path / ".metadata"
        described = Description(number, number, {}, 1.0, filename="step-{step:08d}.pt", nbytes=1, ranks=ranks)
        mark.write_bytes(seal(mark.read_bytes(), described.encode()))
    dist.barrier()
    return path

def by_one(rank_of_it, call):
    if rank == rank_of_it:
        call()
    dist.barrier()

first, second = step(1), step(2)
find = finder(f"{directory}-saved")
live = {"t": sharded(torch.zeros(8, 300)), "n": 0}

def values():
    return [live["n"], *live["t"].to_local().unique().tolist()]

def restore(which="latest", **options):
    attempt(find.restore, live, which, **options)
    told.append(values())

"""


def failing(interpreter: Interpreter, tmp_path: Path, body: str) -> list[Any]:
    return on_ranks(interpreter, tmp_path, MODELS + FINDER + FAIL + body)


def test_damage_that_one_rank_finds_is_an_error_on_all(interpreter: Interpreter, tmp_path: Path) -> None:
    one, other = failing(
        interpreter,
        tmp_path,
        """
by_one(0, lambda: flip(second / "__1_0.distcp", 3000))
restore()
restore(fallback=True)
""",
    )
    assert [kind for kind, _ in (one[0], other[0])] == ["CorruptCheckpointError"] * 2
    assert "rank 1" in one[0][1]
    assert "item t at [4, 0]" in other[0][1]
    assert [ranks[1:] for ranks in (one, other)] == [[[0, 0.0], None, [1, 1.0]]] * 2


def test_state_that_does_not_fit_on_one_rank_is_an_error_on_all(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    one, other = failing(
        interpreter,
        tmp_path,
        """
live.update({"more": 1} if rank == 1 else {})
restore()
live.pop("more", None)
restore()
""",
    )
    assert one[0][0] == "SaveError"
    assert "more" in one[0][1]
    assert other[0][0] == "StateMismatchError"
    assert [ranks[1:] for ranks in (one, other)] == [[[0, 0.0], None, [2, 2.0]]] * 2


def test_ranks_that_restore_different_checkpoints_get_an_error(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    told = failing(
        interpreter,
        tmp_path,
        """
restore(1 + rank)
restore(1)
restore("latest" if rank else first)
""",
    )
    for ranks in told:
        assert ranks[0][0] == "SaveError"
        assert "step-00000001" in ranks[0][1]
        assert "step-00000002" in ranks[0][1]
        assert ranks[1:4] == [[0, 0.0], None, [1, 1.0]]
        assert ranks[4][0] == "SaveError"
        assert ranks[5] == [1, 1.0]


def test_checkpoint_that_is_missing_for_all_ranks_may_be(interpreter: Interpreter, tmp_path: Path) -> None:
    told = failing(
        interpreter,
        tmp_path,
        """
restore(9, missing_ok=True)
restore(9)
restore("nowhere")
""",
    )
    for ranks in told:
        assert ranks[:2] == [None, [0, 0.0]]
        assert [ranks[2][0], ranks[4][0]] == ["CheckpointNotFoundError"] * 2
        assert [ranks[3], ranks[5]] == [[0, 0.0]] * 2


def test_interrupted_rank_stops_the_others(interpreter: Interpreter, tmp_path: Path) -> None:
    one, other = failing(
        interpreter,
        tmp_path,
        """
from asyncckpt._loading.folder_restore import FolderRestore

def interrupted(self):
    raise KeyboardInterrupt

if rank == 1:
    read, FolderRestore.read = FolderRestore.read, interrupted
try:
    restore()
except KeyboardInterrupt:
    told += ["interrupted", values()]
    FolderRestore.read = read
restore()
""",
    )
    assert one[0][0] == "SaveError"
    assert "KeyboardInterrupt" in one[0][1]
    assert other[0] == "interrupted"
    assert [ranks[1:] for ranks in (one, other)] == [[[0, 0.0], None, [2, 2.0]]] * 2


def test_parts_of_chunks_do_not_keep_the_chunks_in_memory(interpreter: Interpreter, tmp_path: Path) -> None:
    told = failing(
        interpreter,
        tmp_path,
        """
from asyncckpt._loading import folder_restore

def sources(self, parts):
    found = original(self, parts)
    told.append([part.place.file for part in parts])
    told.append(sum(tensor.untyped_storage().nbytes() for tensor in found.values()))
    return found

original, folder_restore.FolderRestore._sources = folder_restore.FolderRestore._sources, sources
folder_restore._AT_ONCE = 1
live["t"] = distribute_tensor(torch.zeros(8, 300), init_device_mesh("cpu", (ranks,)), [Shard(1)])
restore()
""",
    )
    half = 4 * 150 * 4
    assert told == [[[], 0, ["__0_0.distcp"], half, ["__1_0.distcp"], half, None, [2, 2.0]]] * 2


@pytest.mark.parametrize("saved", ALL)
def test_load_gives_the_whole_state_as_stock_conversion_does(
    folder: Path, tmp_path: Path, saved: str
) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: PLC0415 - takes a second

    dcp_to_torch_save(folder / saved, tmp_path / "whole.pt")
    wanted: Any = torch.load(tmp_path / "whole.pt", weights_only=False)
    loaded = asyncckpt.load(folder / saved)
    assert list(loaded) == list(wanted)
    assert_same(loaded, wanted)
