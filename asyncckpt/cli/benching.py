"""`asyncckpt bench`: the cost of saves on the given disk."""

from __future__ import annotations

import pickle
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt.cli import output
from asyncckpt.cli.locations import StorageOptions, file_at, options_for, parsed_options, store_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Disk = Annotated[
    str, typer.Option("--dir", metavar="DIR", help="Where your checkpoints go: a path or a URL.")
]
State = Annotated[
    str | None,
    typer.Option(
        "--state", metavar="FILE", help="Save the state of this file instead of one of GPT-2's size."
    ),
]
WeightsOnly = Annotated[
    bool,
    typer.Option(
        "--weights-only/--no-weights-only",
        help="As in torch.load. With --no-weights-only, FILE can execute any code.",
    ),
]
Repeat = Annotated[int, typer.Option("--repeat", min=1, help="Number of measured saves of each kind.")]

_MINUTES = 10  # a usual interval, for comparison
_COLUMNS = {
    "first save": "first_stall_s",
    "stall": "stall_s",
    "lost per save": "lost_s",
    "durable after": "durable_s",
    "save at most every": "interval_s",
}


def bench(  # noqa: PLR0913 - the options of the command
    *,
    directory: Disk,
    state: State = None,
    weights_only: WeightsOnly = True,
    repeat: Repeat = 3,
    option: StorageOptions = None,
    as_json: output.AsJson = False,
) -> None:
    """Measure on your disk what a save costs a training loop, with torch.save and with asyncckpt.

    A state is saved durably in both ways by turns, beside a small training loop (on the GPU if there is one).
    Files are removed afterwards. It takes about a minute, and memory for two copies of the state beside it.

    Example: asyncckpt bench --dir /mnt/checkpoints --state last.pt
    """
    from asyncckpt._bench.place import exit_on_signals, new_place
    from asyncckpt._bench.short import measure
    from asyncckpt._bench.states import distinct_tensors

    exit_on_signals()
    paths = [path for path in (directory, state) if path is not None]
    own = options_for(directory, paths, option)
    about = "GPT-2 124 M + Adam" if state is None else PurePosixPath(state).name
    place = new_place(store_at(directory, own), parsed_options(own))
    with place as folder, output.errors.status("making the state") as status:
        made = _state(state, weights_only, options_for(state or "", paths, option))
        if not distinct_tensors(made):
            raise typer.BadParameter(f"{state} holds no tensors that could be saved", param_hint="--state")
        found = measure(made, folder, repeat, status.update)
    found = {"directory": directory, "state": about, "device": _device()} | found
    if as_json:
        output.print_json(found)
    else:
        _print(found)


def _state(path: str | None, weights_only: bool, option: Sequence[str] | None) -> Any:  # noqa: FBT001 - as given
    from asyncckpt._bench.states import GPT2, device, gpt2
    from asyncckpt._loading.load import load_image
    from asyncckpt._loading.reader import read_image
    from asyncckpt._saving.engine import get_engine

    if path is None:
        with device():
            return gpt2(GPT2)
    store, file = file_at(path, option)
    try:
        image = get_engine().call(read_image, store, file.name)
        return load_image(image, device(), weights_only=weights_only).state
    except pickle.UnpicklingError as error:
        msg = f"{path} holds objects beyond weights, which loading would execute"
        raise typer.BadParameter(
            f"{msg}; add --no-weights-only if you trust it ({error})", param_hint="--state"
        ) from error


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {output.counted(torch.get_num_threads(), 'thread')}"


def _print(found: Mapping[str, Any]) -> None:
    import torch

    from asyncckpt._bench.short import SHARE

    nbytes = found["state_bytes"]
    what = f"{found['state']}, {output.size(nbytes)} in {output.counted(found['tensors'], 'tensor')}"
    output.line(f"{what}, to {found['directory']}; torch {torch.__version__}, {found['device']}")
    table = output.new_table("", *_COLUMNS, right=list(_COLUMNS))
    for way in ("torch.save", "asyncckpt"):
        table.add_row(way, *(_seconds(found[way][name]) for name in _COLUMNS.values()))
    limits = found["limits"]
    table.add_row("limit: copy to host memory", "", _seconds(limits["copy_s"]), "", "", "")
    if "write_s" in limits:
        rate = f"limit: this disk, {output.size(nbytes / limits['write_s'])}/s"
        table.add_row(rate, "", "", "", _seconds(limits["write_s"]), "")
    output.print_table(table)
    output.line("Lost: the stall, and the slowdown of the steps until the checkpoint is complete.", "dim")
    output.line(f"With at least that interval, saves cost less than {SHARE:.0%} of the training time.", "dim")
    ours = found["asyncckpt"]
    budget = f"every=Budget({SHARE}) saves every {_seconds(ours['interval_s'])}"
    regular = f"every=Every(minutes={_MINUTES}) costs {max(ours['lost_s'], 0.0) / (60 * _MINUTES):.3%}"
    output.line(f"asyncckpt: {budget}; {regular}.", "dim")
    output.line(f"Medians of {output.counted(len(found['samples']['ours_stall_s']), 'save')}.", "dim")


def _seconds(value: float) -> str:
    if abs(value) < 1:
        return f"{value * 1e3:.{1 if abs(value) < 0.01 else 0}f} ms"  # noqa: PLR2004 - tenths matter below 10 ms
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"  # noqa: PLR2004 - from 10 s on they do not
