"""The parts of `asyncckpt inspect` that files and folders have in common: sums, and tables."""

from __future__ import annotations

import sys
from datetime import datetime
from math import prod
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.texts import clean, key_text, path_text
from asyncckpt.cli.output import line, new_table, number, size
from asyncckpt.cli.states import print_rest, print_rows, value_text

if TYPE_CHECKING:
    from collections.abc import Sequence

_VALUE_WIDTH = 80


def modules_of(tensors: Sequence[dict[str, Any]], depth: int) -> list[dict[str, Any]]:
    """Return sums for each prefix of names, such as ["model", "layers", "0"], in order.

    Args:
        tensors: their rows.
        depth: how many levels below the entries of the state itself.
    """
    modules: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in tensors:
        # A state dict has the names of modules in its keys, with dots between them.
        keys = (clean(key) if isinstance(key, str) else key_text(key) for key in row["path"][: depth + 2])
        names = [name for key in keys for name in key.split(".")]
        for length in range(1, min(len(names) - 1, depth + 1) + 1):
            modules.setdefault(tuple(names[:length]), []).append(row)
    return [{"path": list(names), **sums_of(rows)} for names, rows in modules.items()]


def sums_of(tensors: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the number of tensors, and what they have together."""
    return {
        "tensors": len(tensors),
        "elements": sum(prod(row["shape"]) for row in tensors),
        "nbytes": sum(row["nbytes"] or 0 for row in tensors),
    }


def print_header(found: dict[str, Any]) -> None:
    """Print who wrote a checkpoint, and what it says of itself."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    facts = {
        "written by": found["written_by"] + (f" ({versions})" if versions else ""),
        "created": _moment(found["created"]) if found["created"] else None,
        "step": found["step"],
        "epoch": found["epoch"],
        "metrics": ", ".join(f"{name} {number(value)}" for name, value in found["metrics"].items()),
        "ranks": found.get("ranks"),
        "byte order": None if found.get("byteorder") == sys.byteorder else found.get("byteorder"),
    }
    line(f"{found['path']}  {size(found['nbytes'])} ({found['nbytes']:,} bytes)", "bold")
    for name, value in facts.items():
        if value not in {None, ""}:
            line(f"  {name:<10}  {value}")


def shape_text(row: dict[str, Any]) -> str:
    """Return the shape of a tensor as a cell of a table."""
    return " x ".join(map(str, row["shape"])) or "scalar"


def nbytes_text(row: dict[str, Any]) -> str:
    """Return the size of a tensor as a cell of a table."""
    return "?" if row["nbytes"] is None else size(row["nbytes"])


def print_modules(modules: Sequence[dict[str, Any]], limit: int | None) -> None:
    """Print the sums of modules, indented by their level."""
    if not modules:
        return
    table = new_table("module", "tensors", "elements", "bytes", right=("tensors", "elements", "bytes"))
    for row in modules[:limit]:
        label = "  " * (len(row["path"]) - 1) + key_text(row["path"][-1])
        table.add_row(label, str(row["tensors"]), f"{row['elements']:,}", size(row["nbytes"]))
    line("")
    print_rows(table, len(modules), limit)


def print_values(values: Sequence[dict[str, Any]], limit: int | None) -> None:
    """Print the entries that are no tensors."""
    if values:
        table = new_table("entry", "value")
        for row in values[:limit]:
            table.add_row(path_text(row["path"]) or "(all)", value_text(row, _VALUE_WIDTH))
        line("")
        print_rows(table, len(values), limit)


def print_refused(refused: Sequence[str], limit: int | None, subject: str) -> None:
    """Print the names that make `subject` refuse a checkpoint."""
    if refused:
        line("")
        line(f"{subject} because of:", "red")
        for name in refused[:limit]:
            line(f"  {name}", "red")
        print_rest(len(refused), limit)
        line("weights_only=False executes them: use it only if you trust the author.")


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # not a valid time
        return f"{seconds} seconds since the epoch"
