"""`asyncckpt bench`: what it measures, what it tells, and what it leaves."""

from __future__ import annotations

import json
import math
import re
import signal
import uuid
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from typer.testing import CliRunner

from asyncckpt._bench.place import new_place
from asyncckpt.cli.app import app
from asyncckpt.errors import StoreError
from asyncckpt.stores import open_store
from support import run_python

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncckpt._bench.short._ALONE", 0.02)
    monkeypatch.setattr("asyncckpt._bench.place._PAUSE", 0)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    torch.save({"model": {"weight": torch.rand(1000, 100), "bias": torch.rand(100)}, "step": 3}, path)
    return path


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "--repeat", "1", *map(str, arguments)])


def told(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_both_ways_and_the_limits_are_measured_and_nothing_is_left(tmp_path: Path, state: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    found = told(bench("--dir", disk, "--state", state, "--json"))
    assert (found["state"], found["tensors"]) == ("state.pt", 2)
    assert found["state_bytes"] == 4 * (1000 * 100 + 100)
    for way in ("torch.save", "asyncckpt"):
        costs = found[way]
        assert all(math.isfinite(value) for value in costs.values())
        assert 0 < costs["stall_s"] <= costs["durable_s"]
        assert costs["interval_s"] == pytest.approx(max(100 * costs["lost_s"], costs["durable_s"]))
    assert found["limits"].keys() == {"copy_s", "write_s"}
    assert list(disk.iterdir()) == []


def test_a_store_is_measured_without_the_limit_of_a_disk() -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    path = url.replace("run", "state.pt")
    with fsspec.open(path, "wb") as file:
        torch.save({"weight": torch.rand(100)}, file)
    result = bench("--dir", url, "--state", path)
    assert result.exit_code == 0, result.output
    heading, *lines = result.stdout.splitlines()
    assert heading.startswith(f"state.pt, 400 B in 1 tensor, to {url}; torch {torch.__version__}, ")
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "torch.save",
        "asyncckpt",
        "limit: copy to host memory",
    ]
    assert "limit: this disk" not in result.stdout
    assert "less than 1% of the training" in result.stdout
    advice = r"every=Budget\(0\.01\) saves every .*s; every=Every\(minutes=10\) costs \d\.\d{3}%\."
    assert re.search(advice, result.stdout)
    assert fsspec.filesystem("memory").find(url) == []


def test_options_go_to_the_side_that_is_a_url(tmp_path: Path) -> None:
    path = f"memory://{uuid.uuid4().hex}/state.pt"
    with fsspec.open(path, "wb") as file:
        torch.save({"weight": torch.rand(100)}, file)
    result = bench("--dir", tmp_path, "--state", path, "--option", "level=1")
    assert result.exit_code == 0, result.output


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    result = bench("--dir", tmp_path / "no")
    assert result.exit_code == 2
    assert "there is no directory" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--option", "a=1"], "takes no storage_options"),
        (["--dir", "unheard-of://x"], "unheard-of"),
    ],
)
def test_a_store_that_cannot_be_opened_is_an_error(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncckpt._bench.states.gpt2", lambda _: pytest.fail("a state was made"))
    result = bench("--dir", tmp_path, *arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_what_is_written_goes_when_the_terminal_is_closed(tmp_path: Path) -> None:
    script = """
        import signal, sys
        from asyncckpt._bench import short
        from asyncckpt.cli.app import app

        short.measure = lambda *_: signal.raise_signal(signal.SIGHUP)
        app(["bench", "--dir", sys.argv[1], "--state", sys.argv[2]])
    """
    torch.save({"weight": torch.rand(3)}, tmp_path / "state.pt")
    disk = tmp_path / "disk"
    disk.mkdir()
    code, _, errors = run_python(script, str(disk), str(tmp_path / "state.pt"))
    assert code == 128 + signal.SIGHUP, errors
    assert list(disk.iterdir()) == []


def test_tensors_are_found_wherever_they_are(tmp_path: Path, state: Path) -> None:
    whole, apart = torch.rand(1000), torch.rand(10)
    sparse = torch.eye(3).to_sparse()
    held = {"t": (whole[3:5], {"x": apart}), "again": whole, "none": torch.empty(0), "sparse": sparse}
    torch.save(held, state)
    found = told(bench("--dir", tmp_path, "--state", state, "--json"))
    tensors = (whole, apart, sparse.indices(), sparse.values())
    assert found["state_bytes"] == sum(tensor.nbytes for tensor in tensors)


def test_a_disk_that_is_too_full_is_an_error(tmp_path: Path) -> None:
    with (
        new_place(open_store(tmp_path), {}) as place,
        pytest.raises(StoreError, match="GB free; the measurement needs"),
    ):
        place.require(10**18)


class Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "state.pt"
    torch.save({"weight": torch.rand(3), "mark": Mark(mark)}, path)
    result = bench("--dir", tmp_path, "--state", path)
    assert result.exit_code == 2
    assert "--no-weights-only" in result.stderr
    assert not mark.exists()
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_without_tensors_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"step": 1}, path)
    result = bench("--dir", tmp_path, "--state", path)
    assert result.exit_code == 2
    assert "no tensors" in result.stderr
