"""What asyncckpt is compared with saves and loads, tells what failed, and syncs what it is said to sync."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from support import run_python

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[1]

# Those that need nothing beside asyncckpt, torch and Lightning, and whether they sync what they write.
# DCP's process is left out, since to start it takes longer than all of these.
SYNCED = {
    "torch_save": False,
    "torch_save_fsync": True,
    "lightning_io": False,
    "lightning_async": False,
    **(
        {"dcp_thread": True} if torch.__version__ >= "2.9" or sys.version_info < (3, 13) else {}
    ),  # fails there
    **({"dcp_cached": True} if torch.__version__ >= "2.9" else {}),  # whose stager older ones have not
    "ours": True,
    "ours_two": True,
    "ours_function": True,
    "ours_reserved": True,
    "ours_plugin": True,
}
ASYNCHRONOUS = [key for key in SYNCED if not key.startswith("torch_save") and key != "lightning_io"]

ROUND_TRIPS = """
    import copy, json, shutil, sys, traceback
    from pathlib import Path

    import peers, torch
    from peers.fsync_notes import Notes
    from sameness import assert_same

    notes = Notes(Path(sys.argv[1]))
    packages = {"lightning", "torch_checkpointing", "torchsnapshot"}
    result = {"imported": sorted(packages & sys.modules.keys())}
    result["about"] = {key: [p.key, p.name, p.package, p.blocks] for key, p in peers.PEERS.items()}

    def new_state():
        weight, moment = torch.rand(64, 32), torch.rand(64, 32)
        adam = {"state": {0: {"moment": moment}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}
        return {"model": {"weight": weight, "tied": weight}, "adam": adam, "step": 0}

    def round_trips(peer):
        state = new_state()
        peer.start(state)
        saved, synced = {}, []
        for name in ("one", "two"):
            saved[name] = copy.deepcopy(state)
            notes.forget()
            peer.save(state, name)
            state["model"]["weight"].add_(1)
            state["adam"]["state"][0]["moment"].zero_()
            state["adam"]["groups"][0]["lr"] = state["step"] = 2
            peer.wait()
            synced.append(notes.synced(peer.path(name)))
        before = copy.deepcopy(state)
        for name, expected in saved.items():
            if peer.key == "lightning_async":
                expected["model"]["tied"] = expected["model"]["tied"].clone()
            assert_same(peer.load(name, state), expected)
            peer.remove(name)
        assert_same(state, before)
        return {"synced": synced, "left": [path.name for path in peer.directory.iterdir()]}

    def fail(peer):
        shutil.rmtree(peer.directory)
        peer.directory.write_bytes(b"in the way")
        try:
            peer.save(new_state(), "three")
        except Exception:
            return "save"
        try:
            peer.wait()
        except BaseException:  # DCP's are no Exceptions
            return "wait"

    for key in sys.argv[3:]:
        directory = Path(sys.argv[2], key)
        directory.mkdir()
        peer = peers.PEERS[key](directory)
        try:
            found = result[key] = {"error": "", **round_trips(peer)}
            found["failure"] = fail(peer)
        except Exception:
            result[key] = {"error": traceback.format_exc()}
        try:
            peer.close()
        except Exception as error:
            assert peer.key == "lightning_async", error  # it tells its failure again
    print(json.dumps(result))
"""

SYNCING = """
    import multiprocessing, os, sys

    SYNC = '''
    import os
    with open({0!r}, "wb") as file:
        os.{1}(file if {1!r} == "fsync" else file.fileno())
    os.replace({0!r}, {0!r} + ".renamed")
    '''

    own, child = sys.argv[1:]
    exec(SYNC.format(own, "fsync"))
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=exec, args=(SYNC.format(child, "fdatasync"),))
    process.start()
    process.join()
    print(process.exitcode, os.environ.get("HIDDEN"))
"""


def run(script: str, *arguments: object, **environment: str) -> str:
    code, output, errors = run_python(script, *map(str, arguments), env=environment)
    assert code == 0, errors
    return output


@pytest.fixture(scope="module")
def notes_class() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        return import_module("peers.fsync_notes").Notes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, notes_class: Any) -> Any:
    noted, disk = tmp_path_factory.mktemp("notes"), tmp_path_factory.mktemp("disk")
    environment = joined(notes_class(noted).environment, ROOT / "benchmarks", ROOT, ROOT / "tests")
    return json.loads(run(ROUND_TRIPS, noted, disk, *SYNCED, **environment).splitlines()[-1])


def joined(environment: Mapping[str, str], *entries: Path) -> dict[str, str]:
    """Put more into the path of an environment."""
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], *map(str, entries)]),
    }


@pytest.mark.parametrize("key", SYNCED)
def test_what_was_saved_is_loaded_whatever_was_changed_since(found: Any, key: str) -> None:
    assert found[key]["error"] == ""
    assert found[key]["left"] == []


@pytest.mark.parametrize("key", SYNCED)
def test_a_peer_syncs_or_not(found: Any, key: str) -> None:
    assert found[key]["synced"] == [SYNCED[key]] * 2


@pytest.mark.parametrize("key", SYNCED)
def test_a_save_that_fails_is_told(found: Any, key: str) -> None:
    assert found[key]["failure"] in ({"save", "wait"} if key in ASYNCHRONOUS else {"save"})


def test_all_that_is_told_of_a_peer_is_told_without_its_package(found: Any) -> None:
    assert found["imported"] == []
    assert all(about[0] == key for key, about in found["about"].items())
    assert len({about[1] for about in found["about"].values()}) == len(found["about"]) == 14


def test_a_file_synced_by_this_process_or_a_child_is_noted_under_any_name(
    tmp_path: Path, notes_class: Any
) -> None:
    notes = notes_class(tmp_path)
    tree = tmp_path / "tree"
    tree.mkdir()
    assert run(SYNCING, tree / "own", tree / "child", **notes.environment).split() == ["0", "None"]
    assert notes.synced(tree / "own.renamed")
    assert notes.synced(tree / "child.renamed")
    assert notes.synced(tree)
    (tree / "deep").mkdir()
    (tree / "deep" / ".hidden").write_bytes(b"")
    assert not notes.synced(tree)
    notes.forget()
    assert not notes.synced(tree / "own.renamed")
    with pytest.raises(FileNotFoundError):
        notes.synced(tree / "own")


def test_another_sitecustomize_is_run_as_well(tmp_path: Path, notes_class: Any) -> None:
    hidden = tmp_path / "site"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import os; os.environ['HIDDEN'] = 'run'", encoding="utf-8")
    notes = notes_class(tmp_path)
    output = run(SYNCING, tmp_path / "own", tmp_path / "child", **joined(notes.environment, hidden))
    assert output.split() == ["0", "run"]
    assert notes.synced(tmp_path / "child.renamed")
