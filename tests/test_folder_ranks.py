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


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_restore_gives_what_stock_load_gives(
    interpreter: Interpreter, folder: Path, tmp_path: Path, ranks: int
) -> None:
    body = f"FOLDER, ALL = {str(folder)!r}, {ALL!r}\n{MODELS}{FINDER}{RESTORE}"
    told = on_ranks(interpreter, tmp_path, body, ranks=ranks)
    kinds = ["fsdp", "tp", "hsdp"][: {1: 1, 2: 2, 3: 2, 4: 3}[ranks]]
    assert told == [[[saved, kind] for saved in ALL for kind in kinds]] * ranks


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
