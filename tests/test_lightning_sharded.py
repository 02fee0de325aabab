"""Sharded strategies of Lightning on two ranks: saved in the background, in the format that Lightning has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric import Fabric
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import asyncckpt
from asyncckpt.lightning import AsyncCheckpointIO
from asyncckpt.testing import Gate, SlowStore
from sharded_lightning import OnCPU
from trainers import QUIET, StoreIO

PROGRAM = Path(__file__).with_name("lightning_ranks.py")
FSDP, MODEL_PARALLEL = "fsdp", "model parallel"


pytestmark = [pytest.mark.timeout(500), *map(pytest.mark.filterwarnings, QUIET)]

SCENARIOS = (
    "steps", "top", "kinds", "fails", "refused", "removal", "plugin", "others", "fabric", "overlapped",
    "sigterm", "package",
)  # fmt: skip


@pytest.fixture(
    scope="module", params=[pytest.param(FSDP, marks=pytest.mark.slow), MODEL_PARALLEL], name="run"
)
def run_scenarios(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All scenarios with a strategy, in one program: to import Lightning takes most of the time.

    FSDP refuses a machine without a GPU unless it is told that the CPU is the device, which the program does;
    `ModelParallelStrategy` is Lightning's own.
    """
    return run_program(tmp_path_factory.mktemp("ranks"), request.param, *SCENARIOS)


@dataclass(frozen=True)
class Run:
    """What the program has left.

    Attributes:
        path: its directory.
        strategy: the strategy.
    """

    path: Path
    strategy: str

    def told(self, scenario: str) -> list[Any]:
        """Return what each rank tells of a scenario."""
        return [json.loads((self.path / f"{scenario}-{rank}.json").read_text()) for rank in range(2)]

    def weights(self, state: Any) -> Any:
        return state["model" if self.strategy == FSDP else "state_dict"]


def run_program(directory: Path, strategy: str, *scenarios: str) -> Run:
    process = subprocess.run(
        [sys.executable, str(PROGRAM), str(directory), strategy, *scenarios],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.returncode == 0, process.stdout
    return Run(directory, strategy)


def known_to_both(told: list[Any]) -> Any:
    assert told[0] == told[1]
    return told[0]


def loaded(path: Path) -> Any:
    """Load what all ranks have saved together, by torch alone."""
    out = path.with_suffix(".full")
    dcp_to_torch_save(path, out)
    return torch.load(out)


def assert_same(found: Any, expected: Any) -> None:
    """Assert equality of keys and values; kinds of dicts and lists do not matter."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_either_class_resumes_from_the_other_and_torch_reads_what_was_saved(run: Run) -> None:
    told = known_to_both(run.told("steps"))
    assert told == {"stock-resumed": 6, "ours-resumed": 6, "ours-again": 6}
    for step in range(1, 5):
        path = run.path / "ours" / f"step={step}.ckpt"
        state, expected = loaded(path), torch.load(run.path / f"ours-{step}.pt")
        assert_same(run.weights(state), expected["weights"])
        assert_same(state["optimizer_0"]["state"], expected["optimizers"][0]["state"])
        asyncckpt.Checkpointer(run.path / "ours", sharded=True).verify(path)
        stock = run.path / "stock" / f"step={step}.ckpt"
        names = [sorted(file.name for file in folder.iterdir()) for folder in (path, stock)]
        assert names[0] == names[1] == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
        metas = [torch.load(folder / "meta.pt", weights_only=False) for folder in (path, stock)]
        assert [list(meta) for meta in metas] == [list(metas[1])] * 2
        assert [meta["global_step"] for meta in metas] == [step] * 2
    for resumed, source in (("stock-resumed", "ours"), ("ours-resumed", "stock"), ("ours-again", "ours")):
        started = torch.load(run.path / f"{resumed}-start.pt")
        assert_same(started, torch.load(run.path / f"{source}-2.pt"))


def test_removals_and_links_wait_for_the_commit_of_a_directory(run: Run) -> None:
    first, second = run.told("top")
    events = first.pop("events")
    assert (second.pop("events"), second.pop("notified")) == ([], [])
    assert first.pop("notified") == ["0.ckpt", "1.ckpt", "2.ckpt"]
    assert known_to_both([first, second]) == {
        "raised": None,
        "best_k_models": {"1.ckpt": 2.0, "2.ckpt": 1.0},
        "best": "2.ckpt",
        "last": "last.ckpt",
        "files": ["1.ckpt", "2.ckpt", "best.ckpt", "last.ckpt"],
        "replaced": [],
        "io": "StoreIO",
        "validated": 1.0,
    }
    links = ["best.ckpt", "last.ckpt"]
    assert [event for event in events if event[0] != "link"] == [
        ["commit_folder", "0.ckpt", []],
        ["commit_folder", "1.ckpt", ["0.ckpt", *links]],
        ["commit_folder", "2.ckpt", ["0.ckpt", "1.ckpt", *links]],
        ["remove", "0.ckpt", ["0.ckpt", "1.ckpt", "2.ckpt", *links]],
    ]
    linked = [(name, there) for operation, name, there in events if operation == "link"]
    assert [name for name, _ in linked] == links * 3
    assert all(f"{index // 2}.ckpt" in there for index, (_, there) in enumerate(linked))


def test_a_pending_directory_exists_and_the_last_one_is_made_of_hard_links(run: Run) -> None:
    told = known_to_both(run.told("kinds"))
    assert told == {
        "raised": None,
        # Before the first batch; before the second: the one that is pending, its next version, and the disk.
        "exist": [False, False, False, True, False, False],
        "weights": ["same-v1.ckpt", "same.ckpt"],
        "last": ["last.ckpt", "step=4.ckpt"],
    }
    weights = loaded(run.path / "weights" / "same.ckpt")
    assert list(weights.values()) == [run.weights(weights)]
    assert "optimizer_0" in loaded(run.path / "last" / "last.ckpt")
    for file in (run.path / "last" / "last.ckpt").glob("*.distcp"):
        assert file.samefile(run.path / "last" / "step=4.ckpt" / file.name)


def test_all_ranks_hear_of_a_failure_and_list_what_is_there(run: Run) -> None:
    told = known_to_both(run.told("fails"))
    raised = {name: known.pop("raised") for name, known in told.items()}
    assert "rank 1: OSError: [Errno 28] No space left" in raised["other"]
    assert "[Errno 28] No space left" in raised["first"]
    for known in told.values():
        assert known == {
            "best_k_models": {"0.ckpt": 3.0},
            "best": "0.ckpt",
            "last": "last.ckpt",
            "files": ["0.ckpt", "last.ckpt"],
            "replaced": [],
            "io": "StoreIO",
        }


def test_all_ranks_refuse_what_the_first_cannot_pickle_and_finish_what_is_pending(
    run: Run,
) -> None:
    told = run.told("refused")
    refused = [known.pop("refused") for known in told]
    assert refused[0].startswith('UnpicklableStateError: state["func"]: cannot pickle')
    assert refused[1] == f"RankError: rank 0: {refused[0]}"
    assert not (run.path / "refused").exists() or not list((run.path / "refused").iterdir())
    known = known_to_both(told)
    assert known["raised"] == "ArithmeticError: of the user"
    assert known["files"] == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]  # the last one on exception
    assert known["replaced"] == []
    for step in 2, 3:
        assert torch.load(run.path / "raises" / f"step={step}.ckpt" / "meta.pt")["global_step"] == step


def test_overlapped_saves_defer_what_each_rank_has_of_a_dtensor(run: Run) -> None:
    told = known_to_both(run.told("overlapped"))
    # By turns, to be compared. What FSDP has copied for the save is not deferred.
    assert told == {"raised": None, "overlapped": [run.strategy == MODEL_PARALLEL, False] * 2}
    for step in range(1, 5):
        state = loaded(run.path / "overlapped" / f"step={step}.ckpt")
        expected = torch.load(run.path / f"overlapped-{step}.pt")
        assert_same(run.weights(state), expected["weights"])
        assert_same(state["optimizer_0"]["state"], expected["optimizers"][0]["state"])


def test_sigterm_waits_for_what_is_pending_on_all_ranks(run: Run) -> None:
    told = known_to_both(run.told("sigterm"))
    assert (told["raised"], told["files"]) == ("SIGTERMException: ", ["step=1.ckpt", "step=2.ckpt"])
    assert told["replaced"] == []
    assert "optimizer_0" in loaded(run.path / "sigterm" / "step=2.ckpt")


def test_the_other_package_saves_in_the_background_too(run: Run) -> None:
    told = known_to_both(run.told("package"))
    assert (told["files"], told["wrote"]) == (["step=2.ckpt"], "asyncckpt")
    assert (told["replaced"], told["io"]) == ([], "TorchCheckpointIO")


def test_a_failed_removal_is_raised_on_all_ranks(run: Run) -> None:
    first, second = run.told("removal")
    assert [first["step"], second["step"]] == [3, 3]
    assert first["raised"].startswith("SaveError: ")
    assert "step=1.ckpt could not be removed or linked: " in first["raised"]
    assert second["raised"] == f"RankError: rank 0: {first['raised']}"


def test_the_plugin_serves_lightnings_own_callback(run: Run) -> None:
    told = known_to_both(run.told("plugin"))
    assert told == {"files": ["step=1.ckpt", "step=2.ckpt"], "wrote": "asyncckpt", "complete": [True, True]}


def test_full_states_are_files_and_a_users_own_save_is_called(run: Run) -> None:
    told = known_to_both(run.told("others"))
    assert (told.pop("calls"), told.pop("wrote")) == (["step=1.ckpt", "step=2.ckpt"], "torch")
    if run.strategy == MODEL_PARALLEL:
        assert (told["ours"], told["raised"], told["files"]) == (True, None, ["step=4.ckpt"])
        assert (told["replaced"], told["io"]) == ([], "TorchCheckpointIO")


def test_fabric_loads_what_was_saved_in_the_background(run: Run) -> None:
    told = known_to_both(run.told("fabric"))
    assert told["seen"] == [1, "two"]
    assert told["wrote"] == ["torch", "asyncckpt", "asyncckpt"]
    assert told["replaced"] == []
    assert len(told["refused"]) == 2
    assert told["refused"][0].startswith("Could not find a")
    assert told["refused"][1].startswith("Found multiple")
    folders = [run.path / name for name in ("fabric-stock", "fabric", "fabric-loaded")]
    states = [loaded(folder) for folder in folders]
    assert sorted(states[0]) == ["model", "opt"]
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])
    metas = [torch.load(folder / "meta.pt", weights_only=False) for folder in folders]
    assert metas[0] == metas[1]
    assert metas[0]["rate"]["step_size"] == 2
    if run.strategy == MODEL_PARALLEL:
        assert sorted(loaded(run.path / "fabric-part")["model"]) == ["0.weight", "1.weight"]


@pytest.mark.slow
def test_a_killed_rank_leaves_no_directory_and_the_other_names_it(tmp_path: Path) -> None:
    run_program(tmp_path, MODEL_PARALLEL, "killed")
    told = json.loads((tmp_path / "killed-0.json").read_text())
    if sys.version_info >= (3, 11):
        (note,) = told["notes"]
        assert "rank 1 had not written its part when rank 0 had waited 2 s" in note
    assert (told["files"], told["best"]) == ([], "")


def attached(**arguments: Any) -> tuple[AsyncCheckpointIO, Any]:
    """Return a plugin, attached to a strategy that trains nothing."""
    io, strategy = AsyncCheckpointIO(), OnCPU(**arguments)
    io.attach(SimpleNamespace(strategy=strategy))
    return io, strategy


def test_what_lightning_refuses_it_refuses_itself_and_a_remote_path_is_refused() -> None:
    io, strategy = attached(state_dict_type="sharded")
    with pytest.raises(TypeError, match=r"FSDPStrategy\.save_checkpoint.*storage_options"):
        strategy.save_checkpoint({"state_dict": {}}, "there", storage_options={})
    with pytest.raises(ValueError, match=r"s3://bucket/there is remote"):
        strategy.save_checkpoint({"state_dict": {}}, "s3://bucket/there")
    io.teardown()
    assert not vars(strategy).keys() & {"save_checkpoint", "load_checkpoint", "teardown"}


def test_methods_that_were_replaced_by_others_stay() -> None:
    strategy: Any = OnCPU(state_dict_type="sharded")
    strategy.load_checkpoint = loads = Mock()
    io = AsyncCheckpointIO()
    io.attach(SimpleNamespace(strategy=strategy))
    assert strategy.load_checkpoint("there") is loads.return_value
    strategy.save_checkpoint = saves = Mock()
    io.teardown()
    assert (strategy.save_checkpoint, strategy.load_checkpoint) == (saves, loads)


def test_a_plugin_is_attached_to_fabric_until_its_block_ends(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    former = fabric.strategy.checkpoint_io
    with StoreIO(lambda store: SlowStore(store, gates={"commit": gate})) as io:
        gate = Gate()
        io.attach(fabric)
        fabric.save(tmp_path / "pending.ckpt", {"step": torch.ones(2)})
        assert not (tmp_path / "pending.ckpt").exists()
        gate.open()
    assert fabric.strategy.checkpoint_io is former
    assert torch.equal(torch.load(tmp_path / "pending.ckpt")["step"], torch.ones(2))


@pytest.mark.parametrize(
    ("timeout", "error"), [("300", TypeError), (0, ValueError), (float("inf"), ValueError)]
)
def test_a_rank_timeout_is_a_positive_number_of_seconds(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="rank_timeout must be"):
        AsyncCheckpointIO(rank_timeout=timeout)
