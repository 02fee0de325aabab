"""Train a small GPT, kill it during a save, resume it, and show what its saves cost.

This process only watches: `train_gpt.py` trains in a process of its own, which can be killed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from asyncckpt import Checkpointer
from picture import draw
from report import console, show_cost, show_files, show_kill, show_replay

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINING = Path(__file__).resolve().with_name("train_gpt.py")
# One core stays free for background work, as it would on a machine whose GPU does the training.
CORES = min(8, max(1, (os.cpu_count() or 1) - 1))

# Runs in a process that does not import asyncckpt: a checkpoint is a plain torch.load file.
STOCK_LOAD = """
import sys, torch
for path in sys.argv[1:]:
    state = torch.load(path, weights_only=True)
    print("step", state["step"])
assert "asyncckpt" not in sys.modules
"""


class Training:
    """One training run over one or more processes, and the events that they printed."""

    def __init__(self, folder: Path, steps: int, save_every: int) -> None:
        self.checkpoints = folder / "checkpoints"
        self.beside = folder / "torch_save"
        self.steps, self.save_every = steps, save_every
        self.events: list[dict[str, Any]] = []
        self.parts = 0
        for leftover in (self.checkpoints, self.beside):
            shutil.rmtree(leftover, ignore_errors=True)
        self.beside.mkdir(parents=True)

    def run(self, *, kill_at: int | None = None) -> None:
        """Train in a new process and show its progress; kill that process while it saves step `kill_at`."""
        self.parts += 1
        command = [sys.executable, str(TRAINING), str(self.checkpoints), "--steps", str(self.steps)]
        command += ["--save-every", str(self.save_every), "--compare", str(self.beside)]
        environment = os.environ | {"OMP_NUM_THREADS": str(CORES)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            watch = Watch(self.steps)
            try:
                with watch.progress:
                    for event in self._follow(process):
                        watch.show(event)
                        if event["event"] == "save" and event["step"] == kill_at:
                            process.kill()
            except BaseException:
                process.kill()
                raise
        expected = 0 if kill_at is None else -signal.SIGKILL
        if process.returncode != expected:
            raise SystemExit(f"The training ended with exit status {process.returncode}, not {expected}.")

    def _follow(self, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
        for line in process.stdout or ():
            event = json.loads(line) | {"part": self.parts}
            self.events.append(event)
            yield event


class Watch:
    """The progress bar of a training run; without a terminal, one line for each save."""

    def __init__(self, steps: int) -> None:
        columns = BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console)
        self._task = self.progress.add_task("", total=steps, status="starting")
        self._values = dict.fromkeys(("loss", "val", "save()", "torch.save"), "…")

    def show(self, event: dict[str, Any]) -> None:
        """Show one event of the training."""
        kind = event["event"]
        if kind == "step":
            self._values["loss"] = f"{event['loss']:.2f}"
        elif kind == "save":
            self._values["val"] = f"{event['val_loss']:.2f}"
            self._values["save()"] = f"{event['stall'] * 1e3:.0f} ms"
        elif kind == "torch.save":
            self._values["torch.save"] = f"{event['stall'] * 1e3:.0f} ms"
        elif kind == "durable":  # belongs to an earlier step
            return
        status = "  ".join(f"{name} [cyan]{value}[/]" for name, value in self._values.items())
        self.progress.update(self._task, completed=event["step"], status=status)
        if kind == "save" and not console.is_terminal:
            console.print(f"step {event['step']}  {status}")


def check(training: Training) -> None:
    """Verify every checkpoint, load it without asyncckpt, and show the results."""
    with Checkpointer(training.checkpoints, filename="step-{step:06d}.pt") as ckpt:
        checkpoints = ckpt.checkpoints()
        with console.status("Verifying every byte, and loading with a plain torch.load"):
            for checkpoint in checkpoints:
                ckpt.verify(checkpoint.path)
            command = [sys.executable, "-c", STOCK_LOAD, *(checkpoint.path for checkpoint in checkpoints)]
            loaded = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    show_files(checkpoints, loaded.splitlines())


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="of the training (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps (default: %(default)s)")
    arguments = parser.parse_args()
    every = arguments.save_every
    kill_at = arguments.steps // 2 // every * every
    if not 1 < every < kill_at:
        parser.error("--steps must be at least 4 times --save-every, and that at least 2")

    begin = time.monotonic()
    training = Training(arguments.out, arguments.steps, every)
    console.print(
        "Training a GPT with 10 million parameters on the source of this Python's standard library."
        f" It saves every {every} steps, keeps the best 3 checkpoints and the newest,"
        f" and is killed while it saves step {kill_at}.\n"
    )
    training.run(kill_at=kill_at)
    show_kill(kill_at, training.checkpoints)
    training.run()
    show_replay(training.events)
    show_cost(training.events)
    check(training)
    shutil.rmtree(training.beside)
    picture = arguments.out / "step-times.png"
    draw(training.events, picture)
    console.print(f"\nPicture of the step times: [bold]{picture}[/]")
    console.print(f"[dim]{time.monotonic() - begin:.0f} seconds in all.[/]")


if __name__ == "__main__":
    main()
