"""Put Lightning's AsyncCheckpointIO and asyncckpt through the same troubles, and print what was seen of each.

    python benchmarks/lightning_scenarios.py                         # a minute or two
    python benchmarks/lightning_scenarios.py --only tied frozen      # some of them; --help lists all
    python benchmarks/lightning_scenarios.py --dir /mnt/nvme --json result.json

Each scenario is one program with a real Trainer and real files, on a disk that is slowed down for both alike:
every file waits before it is written. No cell of the table is fixed beforehand: each tells what was seen.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncckpt._bench.place import exit_on_signals
from harness import forget_peak, options, run_apart, status, temporary_directory
from lightning_sides import (
    SAVES,
    SIDES,
    AfterEachStep,
    Frozen,
    Module,
    Owned,
    Side,
    Tied,
    Told,
    UserError,
    Watch,
    be_quiet,
    files_in,
    start_victim,
)
from report import markdown, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

MIB = 2**20


# The scenarios: each runs on one side and tells in words what came of it.


def queue(side: type[Side], folder: Path) -> str:
    """Save 16 MiB eight times, faster than the disk writes."""
    disk = side(delay=0.2)
    pending: list[int] = []
    blocked, live = 0.0, 0.0

    def save(trainer: lightning.Trainer, step: int) -> None:
        nonlocal blocked, live
        if step == 1:
            forget_peak()
            live = status("VmRSS")
        began = time.perf_counter()
        trainer.save_checkpoint(folder / f"{step}.ckpt")
        blocked += time.perf_counter() - began
        pending.append(step - len(files_in(folder)))

    disk.fit(AfterEachStep(save), module=Module(big=torch.ones(4 * MIB)), steps=8)
    grown = (status("VmHWM") - live) / MIB
    return f"up to {max(pending)} pending, {grown:+.0f} MiB; saves blocked for {blocked:.1f} s in all"


def top_1_behind(side: type[Side], folder: Path) -> str:
    """Keep the newest, saving faster than the disk writes."""
    callback = side.callback(folder, "{step}", save_top_k=1, every_n_train_steps=1)
    with Watch(folder) as watch:
        side().fit(callback)
    return f"{kept(watch, folder)}; {gaps(watch)}"


def top_1_in_time(side: type[Side], folder: Path) -> str:
    """Keep the newest, each file being there before the next save."""
    disk = side()
    callback = side.callback(folder, "{step}", save_top_k=1, every_n_train_steps=1)
    with Watch(folder) as watch:
        disk.fit(AfterEachStep(lambda *_: disk.settle()), callback)
    return f"{gaps(watch)}; {kept(watch, folder)}"


def kept(watch: Watch, folder: Path) -> str:
    """Tell how many files there were."""
    return f"{len(files_in(folder))} left, at most {watch.most} at once"


def gaps(watch: Watch) -> str:
    """Tell of the moments without a checkpoint."""
    return f"{watch.gaps} moments with none, {watch.without_s:.2f} s in all" if watch.gaps else "never none"


def top_3_fixed_name(side: type[Side], folder: Path) -> str:
    """Keep the three best under one name, each save being better than those before."""
    callback = side.callback(folder, "best", "loss", save_top_k=3, every_n_train_steps=1)
    side().fit(callback)
    files = files_in(folder)
    return f"{len(files)} ({', '.join(files)}); listed as the best: {len(callback.best_k_models)}"


def last_link(side: type[Side], folder: Path) -> str:
    """Let a link lead to the newest."""
    callback = side.callback(folder, "{step}", save_last="link", every_n_train_steps=1)
    began = time.perf_counter()
    with Watch(folder) as watch:
        side().fit(callback)
    took = time.perf_counter() - began
    last = folder / "last.ckpt"
    dangling = f"for {watch.dangling_s:.2f} s of {took:.2f} s" if watch.dangling_s else "never"
    return f"{dangling}; in the end it leads to {last.resolve().name if last.exists() else 'nowhere'}"


def mutated(side: type[Side], folder: Path) -> str:
    """Change what is in the state right after the save."""
    array, numbers, owned = np.zeros(3), {0}, Owned()
    path = folder / "mutated.ckpt"

    def save(trainer: lightning.Trainer, step: int) -> None:
        if step == 1:
            trainer.save_checkpoint(path)
            array[:] = 1
            numbers.add(1)
            owned.value = 1

    module = Module(array=array, numbers=numbers, owned=owned)
    side().fit(AfterEachStep(save), module=module, steps=2)
    found = torch.load(path, weights_only=False)
    late = {
        "numpy array": bool(found["array"].any()),
        "set": found["numbers"] != {0},
        "user's object": found["owned"].value != 0,
    }
    return ", ".join(f"{what}: {'the later' if changed else 'as saved'}" for what, changed in late.items())


def frozen(side: type[Side], folder: Path) -> str:
    """Save a frozen dataclass with a tensor."""
    path = folder / "frozen.ckpt"
    module = Module(frozen=Frozen(torch.ones(2)))
    try:
        side().fit(AfterEachStep(lambda trainer, _: trainer.save_checkpoint(path)), module=module, steps=1)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return f"the save raises {type(error).__name__}"
    equal = torch.load(path, weights_only=False)["frozen"].scale.equal(torch.ones(2))
    return "saved" if equal else "saved with another value"


def tied(side: type[Side], folder: Path) -> str:
    """Save a parameter that has two names."""
    path = folder / "tied.ckpt"
    side().fit(AfterEachStep(lambda trainer, _: trainer.save_checkpoint(path)), module=Tied(), steps=1)
    found = torch.load(path, weights_only=False)["state_dict"]
    first, second = (found[f"{name}.weight"].untyped_storage().data_ptr() for name in ("inner", "outer"))
    are = "tied" if first == second else "apart, bytes twice"
    return f"{are}; _metadata {'kept' if hasattr(found, '_metadata') else 'lost'}"


def disk_full(side: type[Side], folder: Path) -> str:
    """Let one save of a fit fail, and save on in it and in the next one, catching what saves raise."""
    disk = side(full_for="1-2.ckpt")
    raised: list[str] = []
    fits = 0

    def saving(fit: int) -> AfterEachStep:
        def save(trainer: lightning.Trainer, step: int) -> None:
            name = f"{fit}-{step}.ckpt"
            try:
                trainer.save_checkpoint(folder / name)
            except Exception:  # noqa: BLE001 - whatever it is, it is counted
                raised.append(name)
            disk.settle()

        return AfterEachStep(save)

    for fit, steps in ((1, 5), (2, 3)):
        try:
            disk.fit(saving(fit), steps=steps)
        except Exception:  # noqa: BLE001 - whatever it is, it is counted
            fits += 1
    files = files_in(folder)
    return (
        f"{len(raised)} of them raise, of which {len({*raised} & {*files})} were written;"
        f" {fits} of the 2 fits raise at their end; {len(files)} of 7 files there"
    )


def disk_full_and_error(side: type[Side], folder: Path) -> str:
    """Let one save fail, and then the user's own code."""
    disk = side(full_for="step=2.ckpt")

    def fail(_: lightning.Trainer, step: int) -> None:
        if step == 3:
            disk.settle()
            raise UserError

    callback = side.callback(folder, "{step}", save_top_k=-1, every_n_train_steps=2)
    try:
        disk.fit(AfterEachStep(fail), callback)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        noted = ", with a note of the failed save" if getattr(error, "__notes__", []) else ""
        return f"{type(error).__name__}{noted}"
    return "nothing"


def load_pending(side: type[Side], folder: Path) -> str:
    """Load what was just saved: a new file, and one that is overwritten."""
    disk = side()
    path = folder / "pending.ckpt"
    loaded: list[str] = []

    def save_and_load(trainer: lightning.Trainer, _: int) -> None:
        trainer.save_checkpoint(path)
        try:
            found = trainer.strategy.load_checkpoint(path, weights_only=False)
        except FileNotFoundError as error:
            loaded.append(type(error).__name__)
        else:
            loaded.append(f"step {found['global_step']}")
        disk.settle()

    disk.fit(AfterEachStep(save_and_load), steps=2)
    return f"a new file: {loaded[0]}; step 2 written over step 1: {loaded[1]}"


def loggers_all(side: type[Side], folder: Path) -> str:
    """Keep all without a metric."""
    return tell(side, side.callback(folder, "{step}", save_top_k=-1, every_n_train_steps=1))


def loggers_metric(side: type[Side], folder: Path) -> str:
    """Keep all with a metric."""
    return tell(side, side.callback(folder, "{step}", "loss", save_top_k=-1, every_n_train_steps=1))


def tell(side: type[Side], callback: ModelCheckpoint) -> str:
    """Let a logger be told of each checkpoint."""
    told = Told()
    side().fit(callback, logger=told)
    return (
        f"told {told.times} times, {told.early} of them with no file at best_model_path;"
        f" found {len(told.found)} of {SAVES} files in all"
    )


def sigterm(side: type[Side], folder: Path) -> str:
    """Let a Trainer that has three saves pending be told to go."""
    return terminated(side, folder)


def sigterm_fabric(side: type[Side], folder: Path) -> str:
    """Let a loop of the user's own be told to go, which does nothing about signals."""
    return terminated(side, folder, "--fabric")


def terminated(side: type[Side], folder: Path, *flags: str) -> str:
    """Tell what a program leaves that is told to go."""
    with start_victim(side, folder, *flags) as process:
        there = len(files_in(folder))
        process.terminate()
        process.communicate()
    return (
        f"{there} there at the signal, {len(files_in(folder))} in the end; exit status {process.returncode}"
    )


def requeue(side: type[Side], folder: Path) -> str:
    """Let SLURM tell a program to have itself requeued; `scontrol` is a double that lists what is there."""
    tools, listed = folder / "bin", folder / "listed"
    tools.mkdir()
    scontrol = tools / "scontrol"
    scontrol.write_text(f"#!/bin/sh\nls {folder} > {folder}/list && mv {folder}/list {listed}\n")
    scontrol.chmod(0o755)
    slurm = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    slurm |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1"}
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    with start_victim(side, folder, PATH=path, **slurm) as process:
        process.send_signal(signal.SIGUSR1)
        while not listed.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()  # as SLURM does
        process.communicate()
    then, now = ("hpc_ckpt_1.ckpt" in names for names in (listed.read_text().split(), files_in(folder)))
    return f"there when scontrol is called: {'yes' if then else 'no'}; in the end: {'yes' if now else 'no'}"


SCENARIOS: dict[str, Callable[[type[Side], Path], str]] = {
    "8 saves of 16 MiB, disk slower than the saves": queue,  # the first one, as it measures memory
    "`save_top_k=1`, 6 saves, disk slower than the saves: files": top_1_behind,
    "`save_top_k=1`, 6 saves, disk faster than the saves: moments without a checkpoint": top_1_in_time,
    "`save_top_k=3`, `filename='best'`, 6 saves, each better: files left": top_3_fixed_name,
    "`save_last='link'`, 6 saves: the link dangles": last_link,
    "changed right after the save: what the file holds": mutated,
    "a frozen dataclass with a tensor in the state": frozen,
    "tied weights, and `state_dict._metadata`, in the file": tied,
    "one file finds the disk full; 6 later saves, in this fit and the next": disk_full,
    "one file finds the disk full, then the user's own code raises: out of `fit` comes": disk_full_and_error,
    "load of what was just saved": load_pending,
    "a logger looks for the checkpoint that it is told of; `save_top_k=-1`": loggers_all,
    "the same with `monitor`": loggers_metric,
    "SIGTERM in `fit`, 3 saves not yet written": sigterm,
    "SIGTERM in a loop of one's own with Fabric, 3 saves not yet written": sigterm_fabric,
    "SLURM's requeue signal: `hpc_ckpt_1.ckpt`": requeue,
}


def play(side: type[Side], folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Run scenarios on one side; returns what came of them."""
    seen = {}
    for what, scenario in SCENARIOS.items():
        if scenario.__name__ in names:
            own = folder / scenario.__name__
            own.mkdir()
            seen[what] = scenario(side, own)
            print(f"{side.name}: {what}: {seen[what]}", file=sys.stderr, flush=True)
    return seen


def play_apart(key: str, directory: Path, names: Sequence[str]) -> dict[str, str]:
    """Run scenarios on one side in a process and a directory of its own."""
    with temporary_directory(directory) as folder:
        arguments = ["--dir", str(folder), "--side", key, "--only", *names]
        # What stock Lightning stages there is then renamed, not copied.
        seen: dict[str, str] = run_apart(__file__, *arguments, TMPDIR=str(folder))
    return seen


def draw(seen: dict[str, dict[str, str]]) -> str:
    """Return the table, in Markdown."""
    rows = [[what, *(cells[what] for cells in seen.values())] for what in next(iter(seen.values()))]
    return "\n".join(markdown(["scenario", *(SIDES[key].name for key in seen)], rows))


def main() -> None:
    """Run both sides and print the table."""
    names = [scenario.__name__ for scenario in SCENARIOS.values()]
    parser = options(__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"some scenarios: {', '.join(names)}",
    )
    parser.add_argument("--side", choices=SIDES, help="run one side, in this process; prints its cells")
    arguments = parser.parse_args()
    folder = arguments.dir.resolve()
    if arguments.side is not None:
        be_quiet()
        print(json.dumps(play(SIDES[arguments.side], folder, arguments.only)))
        return
    exit_on_signals()
    seen = {key: play_apart(key, folder, arguments.only) for key in SIDES}
    write_json(arguments.json, seen)
    print(draw(seen))


if __name__ == "__main__":
    main()
