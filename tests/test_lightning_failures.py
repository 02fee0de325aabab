"""What fails in the background of a Trainer is told once, hides nothing, and leaves what is listed true."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import callbacks as stock
from lightning.pytorch.strategies import SingleDeviceStrategy

from asyncckpt import SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt.lightning import AsyncCheckpointIO, ModelCheckpoint
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from support import start_python
from trainers import QUIET, AtTheEnd, Model, StoreIO, trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from subprocess import Popen

    from torch import Tensor

    from asyncckpt.stores.base import Store

pytestmark = [pytest.mark.filterwarnings(f) for f in QUIET]

FULL = OSError(errno.ENOSPC, "the disk is full")


class Scored(Model):
    """Logs a score at each step, and then does what a test wants it to."""

    def __init__(self, *scores: float, then: Callable[[Scored], object] = id) -> None:
        super().__init__()
        self.scores, self.then = scores or (4.0, 3.0, 2.0, 1.0), then

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.log("score", self.scores[self.trainer.global_step % len(self.scores)])
        self.then(self)
        return super().training_step(batch, index)


class AtBatchEnd(stock.Callback):
    """Calls something before the checkpoint callbacks are called, whose turn is last."""

    def __init__(self, func: Callable[[], object]) -> None:
        self.func = func

    def on_train_batch_end(self, *_: Any) -> None:
        self.func()


def failing(operation: str, error: Exception = FULL, gate: Gate | None = None, **which: Any) -> StoreIO:
    """Return an AsyncCheckpointIO of which some operations fail, and whose commits wait at a gate."""

    def wrap(store: Store) -> Store:
        faulty = FaultyStore(store)
        faulty.fail(operation, error, **which)
        return SlowStore(faulty, gates={} if gate is None else {"commit": gate})

    return StoreIO(wrap, max_in_flight=99)


def checkpoints(path: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "run", "{step}", every_n_train_steps=1, **arguments)


def run_of(*parts: Any, steps: int = 4, **arguments: Any) -> Any:
    io = [part for part in parts if isinstance(part, AsyncCheckpointIO)]
    rest = [part for part in parts if part not in io]
    return trainer(*rest, plugins=io, max_steps=steps, limit_val_batches=0, **arguments)


def go_on(run: Any, steps: int) -> None:
    """Let the same trainer fit for some steps more."""
    run.fit_loop.max_epochs = 99
    run.fit_loop.epoch_loop.max_steps = run.global_step + steps
    run.fit(Scored(*(-float(step) for step in range(99))))  # each is better than all before


def step_of(path: Path | str) -> int:
    return int(torch.load(path, weights_only=False)["global_step"])


def names(path: Path) -> list[str]:
    return sorted(p.name for p in (path / "run").iterdir() if not p.name.startswith("."))


def notes(error: BaseException | None) -> list[str]:
    return list(getattr(error, "__notes__", []))


def assert_true(callback: Any) -> None:
    """Assert that what a callback says, what is on disk, and what it was told to keep agree."""
    there = {str(path): step_of(path) for path in Path(callback.dirpath).iterdir()}
    scores = callback.best_k_models
    listed = {callback.best_model_path, callback.last_model_path, *scores} - {""}
    assert listed <= set(there)
    assert all(f"step={step}" in path for path, step in there.items() if "step=" in path)
    best = f"{callback.dirpath}/best.ckpt"
    if callback.monitor is not None or callback.save_top_k == 1:
        assert set(there) - listed <= {best}
    if callback.save_best and callback.best_model_path:
        assert there[best] == there[callback.best_model_path]
    if callback.monitor is None:
        return
    assert len(scores) <= callback.save_top_k or callback.save_top_k == -1
    assert callback.best_model_path == min(scores, key=scores.get, default="")
    assert callback.best_model_score == (min(scores.values()) if scores else None)
    full = len(scores) == callback.save_top_k or (callback.save_top_k == -1 and scores)
    assert callback.kth_best_model_path == (max(scores, key=scores.get) if full else "")
    assert not full or callback.kth_value == max(scores.values())


MONITORED = {"monitor": "score"}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("at", "arguments"),
    [
        (1, {}),
        (3, {"save_last": True, "save_best": True}),
        (2, {"save_last": "link", "save_best": "link", "save_top_k": -1}),
        (2, MONITORED),
        (1, MONITORED | {"save_last": True}),
        (4, MONITORED | {"save_last": True}),
        (4, MONITORED | {"save_last": "link", "save_best": "link"}),
        (3, MONITORED | {"save_top_k": 2, "save_last": "link", "save_best": True}),
        (3, MONITORED | {"save_top_k": 2, "save_last": True, "save_best": "link"}),
        (2, MONITORED | {"save_top_k": 3, "save_last": True}),
        (4, MONITORED | {"save_top_k": 3, "save_best": "link"}),
        (2, MONITORED | {"save_top_k": -1}),
    ],
)
def test_a_failed_save_is_raised_once_and_everything_listed_exists(
    tmp_path: Path, at: int, arguments: dict[str, Any], *, held: bool
) -> None:
    gate = Gate(opened=not held)
    callback = checkpoints(tmp_path, **arguments)
    run = run_of(callback, AtTheEnd(gate.open), failing("commit", gate=gate, at=at))
    with pytest.raises(SaveError, match="the disk is full") as caught:
        run.fit(Scored())
    assert caught.value.__cause__ is FULL
    assert_true(callback)
    go_on(run, 4)
    assert_true(callback)
    assert step_of(callback.best_model_path) == run.global_step


def test_it_is_raised_at_the_next_save_which_is_taken(tmp_path: Path) -> None:
    callback = checkpoints(tmp_path)
    io = failing("commit", at=2)
    run = run_of(callback, AtBatchEnd(lambda: get_engine().drain()), io)
    with pytest.raises(SaveError, match=r"step 2 to .*step=2.ckpt failed: .*the disk is full"):
        run.fit(Scored())
    assert run.global_step == 3
    assert names(tmp_path) == ["step=3.ckpt"]
    assert_true(callback)


@pytest.mark.parametrize(
    ("at", "times", "kept"),
    [(1, 1, [4]), (2, 1, [4]), (3, 1, [4]), (4, 1, [3]), (2, 3, [1]), (3, 2, [2]), (1, 4, [])],
)
@pytest.mark.parametrize("monitor", [None, "score"])
def test_nothing_is_evicted_because_of_saves_that_failed(
    tmp_path: Path, at: int, times: int, kept: list[int], monitor: str | None
) -> None:
    gate = Gate()
    callback = checkpoints(tmp_path, monitor=monitor)
    with pytest.raises(SaveError) as caught:
        run_of(callback, AtTheEnd(gate.open), failing("commit", gate=gate, at=at, times=times)).fit(Scored())
    assert str(caught.value).count("the disk is full") == times
    assert names(tmp_path) == [f"step={step}.ckpt" for step in kept]
    assert callback.best_model_path == (f"{tmp_path}/run/step={kept[0]}.ckpt" if kept else "")
    assert_true(callback)


@pytest.mark.parametrize("save_best", [None, True, "link"])
def test_what_a_failed_save_was_to_evict_goes_with_the_next_one(tmp_path: Path, save_best: Any) -> None:
    gate = Gate()
    callback = checkpoints(tmp_path, save_best=save_best)
    run: Any = None

    def let_all_but_the_third_through() -> None:
        if run.global_step == 4:
            for count in (1, 2):
                gate.wait_for_arrival(count)
                gate.open()
                gate.close()
            gate.wait_for_arrival(3)

    watch = AtBatchEnd(let_all_but_the_third_through)
    run = run_of(callback, watch, AtTheEnd(gate.open), failing("commit", gate=gate, at=2), steps=5)
    with pytest.raises(SaveError, match="step 2"):
        run.fit(Scored())
    assert_true(callback)


def test_a_last_whose_source_failed_stays_the_former_one(tmp_path: Path) -> None:
    gate = Gate()
    callback = checkpoints(tmp_path, save_top_k=-1, save_last=True)
    io = failing("commit", gate=gate, where=lambda name: name == "step=3.ckpt")
    with pytest.raises(SaveError, match="step 3"):
        run_of(callback, AtTheEnd(gate.open), io, steps=3).fit(Scored())
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert step_of(callback.last_model_path) == 2
    assert_true(callback)


def test_the_best_is_never_a_dangling_link_though_a_later_save_evicts_what_it_led_to(tmp_path: Path) -> None:
    gate = Gate()
    callback = checkpoints(tmp_path, monitor="score", save_top_k=2, save_best="link")
    run = run_of(callback, AtTheEnd(gate.open), failing("commit", gate=gate, at=2), steps=3)
    with pytest.raises(SaveError):
        run.fit(Scored(3.0, 1.0, 2.0))  # the third takes the place of the first, and the second fails
    assert (tmp_path / "run" / "best.ckpt").exists()
    assert_true(callback)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "hands off"), TimeoutError()])
def test_a_failed_removal_is_raised_and_what_was_saved_stays(tmp_path: Path, error: Exception) -> None:
    callback = checkpoints(tmp_path)
    run = run_of(callback, failing("remove", error), steps=2)
    with pytest.raises(SaveError) as caught:
        run.fit(Scored())
    assert caught.value.__cause__ is error
    assert names(tmp_path) == ["step=1.ckpt", "step=2.ckpt"]
    assert callback.best_model_path == f"{tmp_path}/run/step=2.ckpt"
    go_on(run, 1)
    assert names(tmp_path) == ["step=1.ckpt", "step=3.ckpt"]
    assert "step=1.ckpt" in str(caught.value)


@pytest.mark.parametrize("arguments", [{"save_last": "link"}, {"save_best": "link"}])
def test_a_failed_link_is_raised_and_leaves_no_dangling_one(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    callback = checkpoints(tmp_path, **arguments)
    run = run_of(callback, failing("link", at=2), steps=2)
    with pytest.raises(SaveError) as caught:
        run.fit(Scored())
    assert caught.value.__cause__ is FULL
    assert all(path.exists() for path in (tmp_path / "run").iterdir())
    assert not callback.last_model_path or Path(callback.last_model_path).exists()
    go_on(run, 1)
    assert {step_of(path) for path in (tmp_path / "run").glob("[lb]*.ckpt")} == {run.global_step}
    assert ".ckpt" in str(caught.value)


def test_a_state_that_cannot_be_pickled_is_not_listed(tmp_path: Path) -> None:
    class Odd(Scored):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.trainer.global_step == 2:
                checkpoint["odd"] = lambda: None

    callback = checkpoints(tmp_path, monitor="score")
    run = run_of(callback, AsyncCheckpointIO())
    with pytest.raises(SaveError, match="odd"):
        run.fit(Odd())
    assert names(tmp_path) == ["step=1.ckpt"]
    assert_true(callback)


def test_a_save_that_is_refused_since_the_users_own_has_failed_is_not_listed(tmp_path: Path) -> None:
    def save(model: Scored) -> None:
        if model.trainer.global_step == 1:
            model.trainer.save_checkpoint(tmp_path / "run" / "mine.ckpt")
            get_engine().drain()

    callback = checkpoints(tmp_path, monitor="score", save_last=True)
    io = failing("commit", where=lambda name: name == "mine.ckpt")
    with pytest.raises(SaveError, match=r"mine\.ckpt"):
        run_of(callback, io).fit(Scored(then=save))
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"]
    assert_true(callback)


def test_a_step_whose_saves_have_failed_does_not_count_as_saved(tmp_path: Path) -> None:
    callback = checkpoints(tmp_path, save_last=True, save_on_exception=True)
    with pytest.raises(SaveError):
        run_of(callback, failing("commit", times=2), steps=1).fit(Scored())
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"]  # since SaveError is an exception, too


def fail(error: BaseException, at: int) -> Callable[[Scored], None]:
    def then(model: Scored) -> None:
        if model.trainer.global_step == at:
            raise error

    return then


@pytest.mark.parametrize("callback", [ModelCheckpoint, stock.ModelCheckpoint])
def test_the_users_exception_is_what_fit_raises_with_a_note_of_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, callback: Any
) -> None:
    gate = Gate()
    own = RuntimeError("my own")
    saves = callback(tmp_path / "run", "{step}", every_n_train_steps=1)
    run = run_of(saves, AtTheEnd(gate.open), failing("commit", gate=gate))
    with caplog.at_level(logging.ERROR, "asyncckpt"), pytest.raises(RuntimeError) as caught:
        run.fit(Scored(then=fail(own, 1)))
    assert caught.value is own
    if sys.version_info >= (3, 11):
        assert len(notes(own)) == 1
        assert "step=1.ckpt failed: [Errno 28] the disk is full" in notes(own)[0]
    told = [
        r.getMessage() for r in caplog.records if r.name == "asyncckpt" and "RuntimeError" in r.msg % r.args
    ]
    assert len(told) == 1
    assert "the disk is full" in told[0]
    run.fit(Scored())  # of which nothing is left


@pytest.mark.parametrize(
    ("own", "raised"), [(RuntimeError("my own"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_a_save_on_exception_that_fails_does_not_hide_it(
    tmp_path: Path, own: BaseException, raised: type[BaseException]
) -> None:
    callback = ModelCheckpoint(tmp_path / "run", "{step}", save_on_exception=True, save_last=True)
    with pytest.raises(raised) as caught:
        run_of(callback, failing("commit", times=None)).fit(Scored(then=fail(own, 2)))
    assert own in {caught.value, caught.value.__context__}
    if sys.version_info >= (3, 11):
        assert any("the disk is full" in note for note in notes(own))
    assert (callback.last_model_path, callback.best_model_path) == ("", "")


def test_a_removal_that_fails_behind_an_exception_does_not_hide_it(tmp_path: Path) -> None:
    class Named(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "last-{step}"

    own = RuntimeError("my own")
    callback = Named(
        tmp_path / "run", "{step}", every_n_train_steps=2, save_on_exception=True, save_last=True
    )
    io = failing("remove", where=lambda name: name.startswith("last"))
    with pytest.raises(RuntimeError) as caught:
        run_of(callback, io).fit(Scored(then=fail(own, 3)))
    assert caught.value is own
    assert any("the disk is full" in note for note in notes(own)) or sys.version_info < (3, 11)


@pytest.mark.parametrize(
    ("own", "raised"), [(RuntimeError(), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_whatever_ends_training_the_step_is_saved_and_nothing_pending_is_lost(
    tmp_path: Path, own: BaseException, raised: type[BaseException]
) -> None:
    gate = Gate()
    callback = ModelCheckpoint(
        tmp_path / "run",
        "{step}",
        every_n_train_steps=2,
        save_top_k=-1,
        save_on_exception=True,
        save_last=True,
    )
    io = StoreIO(partial(SlowStore, gates={"commit": gate}), max_in_flight=99)
    with pytest.raises(raised) as caught:
        run_of(callback, AtTheEnd(gate.open), io).fit(Scored(then=fail(own, 3)))
    assert raised is not SystemExit or caught.value.args == (1,)
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert step_of(callback.last_model_path) == 3
    assert_true(callback)


def test_a_fit_that_handles_another_exception_raises_what_failed(tmp_path: Path) -> None:
    saves = stock.ModelCheckpoint(tmp_path / "run", "{step}", every_n_train_steps=1)
    run = run_of(saves, failing("commit", at=2), steps=2)
    try:
        step_of(tmp_path / "missing.ckpt")
    except FileNotFoundError:
        with pytest.raises(SaveError, match="the disk is full"):
            run.fit(Scored())


@pytest.mark.parametrize(("steps", "reached"), [(4, 2), (1, 1)])
def test_with_the_stock_callback_it_is_raised_at_the_next_save_or_at_the_end(
    tmp_path: Path, steps: int, reached: int
) -> None:
    saves = stock.ModelCheckpoint(tmp_path / "run", "{step}", every_n_train_steps=1)
    run = run_of(saves, AtBatchEnd(lambda: get_engine().drain()), failing("commit"), steps=steps)
    with pytest.raises(SaveError, match="the disk is full") as caught:
        run.fit(Scored())
    assert isinstance(caught.value.__cause__, SaveError)  # that of the save; it can tell of several
    assert caught.value.__cause__.__cause__ is FULL
    assert run.global_step == reached
    go_on(run, 2)
    assert step_of(saves.best_model_path) == run.global_step


@pytest.mark.parametrize("where", ["{}", "memory://{}"])
def test_what_was_resumed_from_is_never_removed(tmp_path: Path, where: str) -> None:
    from fsspec import url_to_fs  # noqa: PLC0415 - only here

    folder = where.format(tmp_path / "run")
    run_of(ModelCheckpoint(folder, "{step}", every_n_train_steps=1), steps=1).fit(Scored())
    start = f"{folder}/step=1.ckpt"
    callback = ModelCheckpoint(folder, "{step}", every_n_train_steps=1)
    run_of(callback, steps=3).fit(Scored(), ckpt_path=start)
    fs, inner = url_to_fs(folder)
    assert sorted(Path(found).name for found in fs.ls(inner, detail=False)) == ["step=1.ckpt", "step=3.ckpt"]


def test_a_strategy_that_saves_by_itself_is_synchronous_and_says_so_once(tmp_path: Path) -> None:
    class WritesItself(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
            del storage_options
            Path(filepath).parent.mkdir(exist_ok=True)
            torch.save(checkpoint, filepath)

    there = []
    callback = checkpoints(tmp_path, monitor="score", save_top_k=2, save_last=True)
    run = run_of(
        callback,
        strategy=WritesItself("cpu"),
        accelerator="auto",
        logger=False,
    )
    with pytest.warns(UserWarning, match="WritesItself.*writes its checkpoints itself") as caught:
        run.fit(Scored(then=lambda _: there.append(Path(callback.last_model_path or tmp_path).exists())))
    assert len([w for w in caught if "WritesItself" in str(w.message)]) == 1
    assert all(there)
    assert names(tmp_path) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    assert_true(callback)


def test_slurm_requeues_when_the_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen.ckpt"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncp {tmp_path}/hpc_ckpt_1.ckpt {seen}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "77", "JOB_NAME": "night", "NTASKS": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def signalled(model: Scored) -> None:
        if model.trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    callback = checkpoints(tmp_path)
    run = trainer(
        callback,
        plugins=[SLURMEnvironment(auto_requeue=True)],
        default_root_dir=tmp_path,
        max_steps=4,
        limit_val_batches=0,
    )
    run.fit(Scored(then=signalled))
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert step_of(seen) == 3
    assert names(tmp_path) == ["step=4.ckpt"]


class Interrupting:
    """Raises a signal when it is pickled for the first time."""

    raised = False

    def __getstate__(self) -> dict[str, Any]:
        if not Interrupting.raised:
            Interrupting.raised = True
            signal.raise_signal(signal.SIGUSR2)
        return {"value": 7}


def test_a_signal_handler_may_save_while_a_save_is_being_made(tmp_path: Path) -> None:
    class Interrupted(Scored):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["object"] = Interrupting()

    Interrupting.raised = False
    callback = checkpoints(tmp_path, save_last=True)
    run = run_of(callback, steps=2)
    saved = []

    def handle(*_: object) -> None:
        run.save_checkpoint(tmp_path / "handled.ckpt")
        saved.append(step_of(tmp_path / "handled.ckpt"))

    former = signal.signal(signal.SIGUSR2, handle)
    try:
        run.fit(Interrupted())
    finally:
        signal.signal(signal.SIGUSR2, former)
    assert saved == [1]
    assert names(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert_true(callback)
    assert vars(torch.load(callback.last_model_path, weights_only=False)["object"]) == {"value": 7}


PREPARE = """
import asyncio, logging, os, sys, time, warnings
logging.basicConfig()
warnings.simplefilter("ignore")
import lightning, torch
from asyncckpt.lightning import AsyncCheckpointIO, ModelCheckpoint
from asyncckpt.testing import SlowStore
from trainers import Model, StoreIO, trainer

class Told(SlowStore):
    # says what is about to happen, and goes on when a line comes in
    async def before(self, operation, subject):
        if operation == "commit":
            print(operation, flush=True)
            await asyncio.to_thread(sys.stdin.readline)

path, timeout = sys.argv[1], float(sys.argv[2])
"""

UNTIL_THE_SIGNAL = """
class Endless(Model):
    def training_step(self, batch, index):
        while self.trainer.global_step == 1 and not self.trainer.received_sigterm:
            time.sleep(0.01)
        return super().training_step(batch, index)

class Says(lightning.Callback):
    def on_exception(self, trainer, module, error):
        print(type(error).__name__, flush=True)

io = StoreIO(Told, preemption_timeout=timeout or None)
saves = ModelCheckpoint(path, "{step}", every_n_train_steps=1)
trainer(Says(), saves, plugins=[io], limit_val_batches=0).fit(Endless())
"""

AT_ONCE = """
from lightning.fabric import Fabric

saves = ModelCheckpoint(path, "{step}", every_n_train_steps=1)
trainer(saves, max_steps=2, limit_val_batches=0).fit(Model())
fabric = Fabric(accelerator="cpu", devices=1, plugins=[AsyncCheckpointIO()])
state = {"global_step": 5, "weight": torch.ones(1 << 20)}
fabric.save(os.path.join(path, "fabric.ckpt"), state)
state["weight"].zero_()
"""

SCRIPTS = {"waits": UNTIL_THE_SIGNAL, "gives up": UNTIL_THE_SIGNAL, "ends": AT_ONCE}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Popen[str], Path]]]:
    """Start all programs at once: most of their time they import."""
    tests = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = {}
    for name, script in SCRIPTS.items():
        path = tmp_path_factory.mktemp("program")
        arguments = str(path / "run"), "0.1" if name == "gives up" else "0"
        started[name] = start_python(PREPARE + script, *arguments, env=tests), path
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


def until_told_to_go(process: Popen[str], path: Path) -> None:
    """Send SIGTERM while a save is pending, and wait until the Trainer stops."""
    assert process.stdout is not None
    lines = (line for line in process.stdout if line in {"commit\n", "SIGTERMException\n"})
    assert next(lines) == "commit\n"
    process.send_signal(signal.SIGTERM)
    assert next(lines) == "SIGTERMException\n"
    assert names(path) == []


def test_sigterm_waits_for_what_is_pending(programs: dict[str, tuple[Popen[str], Path]]) -> None:
    process, path = programs["waits"]
    until_told_to_go(process, path)
    _, errors = process.communicate("\n\n", timeout=60)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors
    assert names(path) == ["step=2.ckpt"]
    assert step_of(path / "run" / "step=2.ckpt") == 2


def test_sigterm_gives_up_what_takes_too_long(programs: dict[str, tuple[Popen[str], Path]]) -> None:
    process, path = programs["gives up"]
    until_told_to_go(process, path)
    assert process.stderr is not None
    told = next(line for line in process.stderr if "given up" in line)
    assert f"{path}/run/step=2.ckpt" in told
    process.communicate("\n", timeout=60)  # the file that is being committed cannot be let go of
    assert process.returncode == 0
    assert set(names(path)) <= {"step=1.ckpt"}


def test_a_program_may_end_right_behind_a_save(programs: dict[str, tuple[Popen[str], Path]]) -> None:
    process, path = programs["ends"]
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (0, False), errors
    assert names(path) == ["fabric.ckpt", "step=2.ckpt"]
    assert torch.load(path / "run" / "fabric.ckpt")["weight"].unique().tolist() == [1.0]
