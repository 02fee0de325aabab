"""The report of the demo: the kill, the resumed run, what each save cost, and the files on disk."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from asyncckpt import Checkpoint

MIB = 2**20

console = Console(highlight=False)


def show_kill(step: int, directory: Path) -> None:
    """Show the files in a directory just after its writer was killed."""
    console.print(
        f"\n[bold red]Killed[/] (SIGKILL) right after the save of step {step} had returned. On disk now:"
    )
    for file in sorted(directory.iterdir()):
        console.print(f"  {file.name}  {file.stat().st_size / MIB:.0f} MiB")
    console.print("Starting it again, with the same command.\n")


def show_replay(events: Sequence[dict[str, Any]]) -> None:
    """Show where the second process resumed, and whether its losses equal those of the first process."""
    start = next(event for event in events if event["event"] == "start" and event["part"] == 2)  # noqa: PLR2004
    first, second = (
        {e["step"]: e["loss"] for e in events if e["event"] == "step" and e["part"] == part}
        for part in (1, 2)
    )
    repeated = sorted(first.keys() & second.keys())
    different = [step for step in repeated if first[step] != second[step]]
    same = f"different losses at steps {different}" if different else "bit-identical losses"
    console.print(
        f"\n[bold green]Resumed[/] at step {start['step']}. The first process had trained {len(repeated)}"
        f" steps beyond it; repeated, they gave [bold]{same}[/].\n"
    )


def show_cost(events: Sequence[dict[str, Any]]) -> None:
    """Show for each save how long training stood still, beside `torch.save` of the same state."""
    durable = {(e["part"], e["step"]): e for e in events if e["event"] == "durable"}
    saves = [event for event in events if event["event"] == "save"]
    stock = [event for event in events if event["event"] == "torch.save"]  # one before each of the saves

    table = Table(title="What the saves cost", title_style="bold", show_footer=True)
    table.add_column("step", "median", justify="right")
    table.add_column("val loss", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("save()\nstall", _ms(median(e["stall"] for e in saves)), justify="right", style="green")
    table.add_column("save()\ndurable", _ms(median(e["durable"] for e in durable.values())), justify="right")
    middle = _ms(median(e["stall"] for e in stock))
    table.add_column("torch.save\nstall", middle, justify="right", style="red")
    table.add_column("+ fsync:\ndurable", _ms(median(e["durable"] for e in stock)), justify="right")
    for ours, theirs in zip(saves, stock, strict=False):
        done = durable.get((ours["part"], ours["step"]))
        table.add_row(
            str(ours["step"]),
            f"{ours['val_loss']:.3f}",
            _mib(done["nbytes"]) if done else "",
            _ms(ours["stall"]),
            _ms(done["durable"]) if done else "[red]killed[/]",
            _ms(theirs["stall"]),
            _ms(theirs["durable"]),
        )
    console.print(table)
    reserved = " and ".join(_ms(event["seconds"]) for event in events if event["event"] == "reserve")
    console.print(
        "Stall: how long training stood still. Durable: time from the call until the file was synced and had"
        f" its name. reserve() made host memory ready after the first step of each process: {reserved}. Each"
        " torch.save is of the same model and optimizer, halfway between two saves.\n",
        style="dim",
    )


def show_files(checkpoints: Sequence[Checkpoint], loaded: Sequence[str]) -> None:
    """Show the checkpoints that were kept, each verified, and what `torch.load` found in each."""
    best = sorted(checkpoints, key=lambda c: c.metrics["val_loss"])[:3]
    table = Table(title="What is on disk", title_style="bold")
    table.add_column("file", no_wrap=True)
    table.add_column("val loss", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("verify")
    table.add_column("torch.load")
    table.add_column("kept as")
    for checkpoint, found in zip(checkpoints, loaded, strict=True):
        reasons = ["newest"] * (checkpoint is checkpoints[-1]) + ["best 3"] * (checkpoint in best)
        table.add_row(
            checkpoint.path.rpartition("/")[2],
            f"{checkpoint.metrics['val_loss']:.3f}",
            _mib(checkpoint.nbytes),
            "[green]whole[/]",
            f"[green]{found}[/]",
            ", ".join(reasons),
        )
    console.print(table)
    console.print(
        "verify read every byte and compared every CRC-32. torch.load ran with weights_only=True, in a Python"
        " process that had not imported asyncckpt.",
        style="dim",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"
