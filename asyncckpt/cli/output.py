"""Print results on stdout as text, tables or JSON, and errors and progress on stderr."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from asyncckpt._inspection.texts import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_new_console = partial(Console, markup=False, highlight=False, emoji=False)
console = _new_console()
errors = _new_console(stderr=True)
_endless = _new_console(width=100_000)  # piped output is not cut to the width of a terminal

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_ROUNDED_UP = 999.5  # has three digits as 1.00 of the next unit only
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"))
_EXACT = 1e15


def line(text: str, style: str | None = None) -> None:
    """Print one line on stdout, however long; control characters, as in file names, are escaped."""
    console.print(clean(text), style=style, soft_wrap=True)


def complain(problem: str | BaseException) -> None:
    """Print an error on stderr."""
    text = "\n".join(map(clean, message(problem).splitlines()))
    errors.print(f"asyncckpt: {text}", soft_wrap=True)


def message(problem: str | BaseException) -> str:
    """Return the text of an error without its number, and with its file if it has one."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        return str(problem)
    return problem.strerror if problem.filename is None else f"{problem.strerror} ({problem.filename})"


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; NaN and the infinities, which JSON lacks, become strings."""
    # Not with rich, which takes a minute for the names of a hundred thousand tensors.
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return a table without lines.

    Args:
        columns: their headings.
        right: those aligned to the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(clean(column), justify="right" if column in right else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table on stdout, in full width if that is not a terminal."""
    (console if console.is_terminal else _endless).print(table)


@contextmanager
def bytes_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if that is a terminal; yields a function to call with more bytes."""
    if not errors.is_terminal or errors.is_dumb_terminal:
        yield lambda _: None
        return
    from rich import progress

    columns = progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn()
    name = progress.TextColumn("{task.description}", markup=False)
    with progress.Progress(
        *(name, *columns, progress.TimeRemainingColumn()),
        console=errors,
        transient=True,
        redirect_stdout=False,  # output on stdout stays on stdout
        redirect_stderr=False,
    ) as bar:
        yield partial(bar.advance, bar.add_task(clean(label), total=total))


def name(text: str, *, is_folder: bool) -> str:
    """Return the name of a file, or of a folder with a slash behind it, as a cell of a table."""
    return clean(text) + "/" * is_folder


def number(value: float) -> str:
    """Return a metric in five digits; a whole number as it is."""
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < _EXACT else f"{value:.5g}"


def size(nbytes: float) -> str:
    """Return a size in three digits and decimal units: 1.49 GB."""
    if nbytes < _ROUNDED_UP:
        return f"{nbytes:.0f} B"
    power = 0
    while nbytes >= _ROUNDED_UP and power < len(_UNITS) - 1:
        nbytes, power = nbytes / 1000, power + 1
    return f"{nbytes:#.3g}".rstrip(".") + f" {_UNITS[power]}"


def age(seconds: float) -> str:
    """Return a time span in the largest unit that fits twice: 90 min."""
    for length, unit in _AGES:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 file, 2 files."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
