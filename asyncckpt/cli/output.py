"""What the commands print, and where: results to stdout, all else to stderr."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from asyncckpt._inspection.texts import clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

console = Console(markup=False, highlight=False, emoji=False)
errors = Console(stderr=True, markup=False, highlight=False, emoji=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

# What is piped is not cut to the width that a terminal might have.
_endless = Console(width=100_000, markup=False, highlight=False, emoji=False)
_SIZES = ((10**15, "PB"), (10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_ROUNDED_UP = 0.9995  # 999.5 kB have three digits as 1.00 MB only
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"))
_EXACT = 1e15


def line(text: str, style: str | None = None) -> None:
    """Print one line on stdout, however long it is; control characters, as in names of files, are escaped."""
    console.print(clean(text), style=style, soft_wrap=True)


def complain(problem: str | BaseException) -> None:
    """Print what went wrong on stderr."""
    text = "\n".join(map(clean, message(problem).splitlines()))
    errors.print(f"asyncckpt: {text}", soft_wrap=True)


def message(problem: str | BaseException) -> str:
    """Return an error as a user reads it: without its number, and with the file if there is one."""
    if not isinstance(problem, OSError) or problem.strerror is None:
        return str(problem)
    return problem.strerror if problem.filename is None else f"{problem.strerror} ({problem.filename})"


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; NaN and the infinities become strings: JSON has no such numbers."""
    # Rich takes a minute for what is as long as the names of a hundred thousand tensors.
    typer.echo(json.dumps(_plain(value), indent=1, allow_nan=False))


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return a table without lines.

    Args:
        columns: their headings.
        right: which of them hold numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(clean(column), justify="right" if column in right else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table on stdout."""
    (console if console.is_terminal else _endless).print(table)


@contextmanager
def bytes_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if that is a terminal; yields what is to be told of more bytes."""
    if not errors.is_terminal or errors.is_dumb_terminal:
        yield lambda _: None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        # What is printed on stdout meanwhile stays there.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        yield partial(bar.advance, bar.add_task(clean(label), total=total))


def number(value: float) -> str:
    """Return a metric in five digits; a whole number as it is."""
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value.is_integer() and abs(value) < _EXACT else f"{value:.5g}"


def size(nbytes: float) -> str:
    """Return a size in three digits and decimal units: 1.49 GB."""
    for length, unit in _SIZES:
        if nbytes >= length * _ROUNDED_UP:
            return f"{nbytes / length:#.3g}".rstrip(".") + f" {unit}"
    return f"{nbytes:.0f} B"


def age(seconds: float) -> str:
    """Return a time span in the largest unit that it holds twice: 90 min."""
    for length, unit in _AGES:
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 file, 2 files."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
