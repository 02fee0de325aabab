"""How the entries of a state are told: as rows of a table, and in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._outline.texts import key_text, short
from asyncckpt.cli.output import line, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from asyncckpt._outline.walk import Path

ShowAll = Annotated[bool, typer.Option("--all", help="Show all rows of each table.")]

# Of each table, unless all are asked for.
ROWS = 50
_ROOM = 200
_MAX_INTEGER = 1 << 64
_PLAIN = (type(None), bool, int, float, str)


def print_rows(table: Table, count: int, limit: int | None) -> None:
    """Print a table of the first `limit` of `count` rows, and how many more there are."""
    print_table(table)
    print_rest(count, limit)


def print_rest(count: int, limit: int | None) -> None:
    """Say how many more there are than `limit`; None shows all."""
    if limit is not None and count > limit:
        line(f"… and {count - limit:,} more; --all shows them", "dim")


def json_path(path: Path) -> list[Any]:
    """Return the keys of a path; those that JSON does not have, as text."""
    return [key if _is_plain(key) else key_text(key) for key in path]


def json_value(node: Any) -> dict[str, Any]:
    """Return {"value": …} for what JSON has, and {"text": …}, shortened, for what it does not."""
    if type(node) is list and all(map(_is_plain, node)):
        return {"value": node}
    return {"value": node} if _is_plain(node) else {"text": short(node, _ROOM)}


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN and (type(value) is not int or abs(value) < _MAX_INTEGER)
