"""Tables of the entries of a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.texts import short
from asyncckpt.cli.output import line, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

ShowAll = Annotated[bool, typer.Option("--all", help="Show all rows of each table.")]

# Of each table, without --all.
ROWS = 50


def print_rows(table: Table, count: int, limit: int | None) -> None:
    """Print a table of the first `limit` of `count` rows, and how many more there are."""
    print_table(table)
    print_rest(count, limit)


def print_rest(count: int, limit: int | None) -> None:
    """Print how many rows beyond `limit` are not shown; None shows all."""
    if limit is not None and count > limit:
        line(f"… and {count - limit:,} more; --all shows them", "dim")


def value_text(row: Mapping[str, Any], room: int = 60) -> str:
    """Return a value, in JSON {"value": …} or {"text": …}, as a cell of a table."""
    if "value" in row:
        return short(row["value"], room)
    text: str = row["text"]
    return text if len(text) <= room else text[: room - 1] + "…"
