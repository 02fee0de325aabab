"""Two processes that train together: one of them writes, and both know how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

# Each process writes down what it knows: at the end of a run, or when the callback raises. The barrier there
# is needed as the launchers end all processes once one of them has failed.
SCRIPT = """\
import atexit
import json
import os
import sys
import warnings
from contextlib import contextmanager

warnings.simplefilter("ignore")

import lightning
import torch
from trainers import Model, StoreIO, delay_copies, trainer

from asyncckpt import SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.saver import Saver
from asyncckpt.lightning import ModelCheckpoint
from asyncckpt.testing import FaultyStore, SlowStore

DIRECTORY, STRATEGY, *FITS = sys.argv[1:]


def tell(trainer, error):
    callback, rank = trainer.checkpoint_callback, trainer.global_rank
    scores = {os.path.basename(path): score.item() for path, score in callback.best_k_models.items()}
    asked = [os.path.join(callback.dirpath, name) for name in ("0.ckpt", "1.ckpt")]
    known = {
        "error": error,
        "step": trainer.global_step,
        "files": sorted(os.listdir(callback.dirpath)),
        "best_k_models": scores,
        "best": os.path.basename(callback.best_model_path),
        "last": os.path.basename(callback.last_model_path),
        "worst": [os.path.basename(callback.kth_best_model_path), float(callback.kth_value)],
        "exist": [callback.file_exists(path, trainer) for path in asked],
    }
    with open(f"{callback.dirpath}-{rank}.json", "w") as file:
        json.dump(known, file)


def end_gloo():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Told(Model):
    def setup(self, stage):
        # Lightning leaves gloo's threads running. One that drops the last reference to a tensor while the
        # interpreter finalizes aborts the process (pytorch/pytorch#190489).
        atexit.unregister(end_gloo)
        atexit.register(end_gloo)

    # It comes after that of the callbacks.
    def teardown(self, stage):
        tell(self.trainer, None)

    def on_train_epoch_start(self):
        if self.trainer.checkpoint_callback.dirpath.endswith("next"):
            get_engine().drain()  # what has failed is known by the next save


class Watched(ModelCheckpoint):
    @contextmanager
    def telling(self, trainer):
        try:
            yield
        except SaveError as error:
            get_engine().drain()
            trainer.strategy.barrier()
            tell(trainer, str(error))
            trainer.strategy.barrier()
            raise

    def on_train_epoch_end(self, trainer, module):
        with self.telling(trainer):
            super().on_train_epoch_end(trainer, module)

    def on_train_end(self, trainer, module):
        with self.telling(trainer):
            super().on_train_end(trainer, module)


class Looking(lightning.Callback):
    # Its turn comes before that of the checkpoints.
    def on_train_end(self, trainer, module):
        with open(f"{trainer.checkpoint_callback.dirpath}-{trainer.global_rank}.found", "w") as file:
            file.write(str(os.path.exists(trainer.checkpoint_callback.best_model_path)))


class Wide(Told):
    # Its weights are large enough to be deferred.
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4096)


class Weights(lightning.Callback):
    def on_train_start(self, trainer, module):
        self.saves, self.weights, save = [], {}, Saver.save

        def noting(*args, **arguments):
            self.saves.append(save(*args, **arguments))
            return self.saves[-1]

        Saver.save = noting

    def on_train_batch_end(self, trainer, module, *_):
        self.weights[trainer.global_step] = module.layer.weight.detach().clone()

    def on_train_end(self, trainer, module):
        directory = trainer.checkpoint_callback.dirpath
        states = {step: torch.load(f"{directory}/{step}.ckpt")["state_dict"] for step in self.weights}
        equal = [torch.equal(states[step]["layer.weight"], weight) for step, weight in self.weights.items()]
        overlapped = [save.stats.overlapped for save in self.saves]
        with open(f"{directory}-{trainer.global_rank}.found", "w") as file:
            json.dump([equal, overlapped], file)


def fit_overlapped(name):
    delay_copies(setattr)
    callback = ModelCheckpoint(
        os.path.join(DIRECTORY, name), "{step}", every_n_train_steps=1, save_top_k=-1,
        auto_insert_metric_name=False, overlap=True,
    )
    trainer(Weights(), callback, strategy=STRATEGY, devices=2, max_epochs=2).fit(Wide())


def slow(store):
    return SlowStore(store, delays={"commit": 0.2})


def fail_second(store):
    double = FaultyStore(store)
    double.fail("commit", OSError(28, "No space left on device"), where="1.ckpt".__eq__)
    return double


def fit(name):
    callback = Watched(
        os.path.join(DIRECTORY, name), "{epoch}", "val_loss", save_top_k=2, save_last=True, save_best="link",
        auto_insert_metric_name=False,
    )
    model = Told([3.0, 2.0, 1.0])
    plugins = {"good": [], "slow": [StoreIO(slow)]}.get(name, [StoreIO(fail_second)])
    epochs = 2 if name == "end" else 3
    run = trainer(Looking(), callback, strategy=STRATEGY, devices=2, max_epochs=epochs, plugins=plugins)
    try:
        run.fit(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    state = torch.load(os.path.join(callback.dirpath, "last.ckpt"))["state_dict"]
    weights = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return [os.path.basename(callback.best_model_path), weights, type(run.strategy.checkpoint_io).__name__]


if __name__ == "__main__":
    ends = {name: fit_overlapped(name) if name == "overlapped" else fit(name) for name in FITS}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with open(os.path.join(DIRECTORY, "ends.json"), "w") as file:
            json.dump(ends, file)
"""


def run_in_two_processes(directory: Path, strategy: str, fits: list[str]) -> Any:
    script = directory / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(directory), strategy, *fits],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"it hangs:\n{output}")
    assert process.returncode == 0, output
    sys.stdout.write(output)  # shown if the test fails: a rank that dies says there of what
    return json.loads((directory / "ends.json").read_text())


def known_to_both(directory: Path, name: str) -> Any:
    first, second = (json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


# One run of the program for each: to start its processes takes most of the time.
@pytest.mark.parametrize(
    ("strategy", "failing"),
    [
        pytest.param("ddp", "at the next save", marks=pytest.mark.slow),
        ("ddp_fork", "at the end"),
        pytest.param("ddp_spawn", None, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_know_what_was_saved_and_what_failed(
    tmp_path: Path, strategy: str, failing: str | None
) -> None:
    bad = {"at the next save": ["next"], "at the end": ["end"], None: []}[failing]
    overlapped = [] if strategy == "ddp_spawn" else ["overlapped"]  # three times as slow to start
    ends = run_in_two_processes(tmp_path, strategy, ["good", "slow", *overlapped, *bad])
    assert known_to_both(tmp_path, "good") == {
        "error": None,
        "step": 6,
        "files": ["1.ckpt", "2.ckpt", "best.ckpt", "last.ckpt"],
        "best_k_models": {"1.ckpt": 2.0, "2.ckpt": 1.0},
        "best": "2.ckpt",
        "last": "last.ckpt",
        "worst": ["1.ckpt", 2.0],
        "exist": [False, True],
    }
    assert [(tmp_path / f"slow-{rank}.found").read_text() for rank in range(2)] == ["True", "True"]
    assert ends.pop("slow")[0] == "2.ckpt"
    assert ends.pop("good") == ["2.ckpt", True, "TorchCheckpointIO"]
    for name in overlapped:
        found = [json.loads((tmp_path / f"{name}-{rank}.found").read_text()) for rank in range(2)]
        # By turns, to be compared; only the first rank writes.
        assert found == [[[True] * 4, [True, False] * 2], [[True] * 4, []]]
    assert (tmp_path / "good" / "2.ckpt").samefile(tmp_path / "good" / "best.ckpt")
    for name in bad:
        known = known_to_both(tmp_path, name)
        assert "No space left" in known.pop("error")
        after = name == "next"  # the save that tells of the failure is taken before it is raised
        assert known == {
            "step": 6 if after else 4,
            "files": ["0.ckpt", *(["2.ckpt"] if after else []), "best.ckpt", "last.ckpt"],
            "best_k_models": {"0.ckpt": 3.0} | ({"2.ckpt": 1.0} if after else {}),
            "best": "2.ckpt" if after else "0.ckpt",
            "last": "last.ckpt",
            "worst": ["0.ckpt", 3.0] if after else ["", torch.inf],
            "exist": [True, False],
        }
        assert "SaveError: saving step 4" in ends[name]
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == known["files"]
        # A subclass saves the last by itself, though it is the file that failed.
        steps = [torch.load(tmp_path / name / link)["global_step"] for link in ("best.ckpt", "last.ckpt")]
        assert steps == ([6, 6] if after else [2, 4])
