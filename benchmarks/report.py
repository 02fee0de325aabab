"""What the tables of all benchmarks share: how figures are written, what a run was made on, Markdown."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_MINUTES = 300  # seconds that are written as minutes


def seconds(value: float) -> str:
    """Return a time in the unit in which it is easily read."""
    if math.isnan(value):
        return "?"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    milliseconds = value * 1e3
    return f"{milliseconds:.{2 if abs(milliseconds) < 10 else 0}f} ms"


def size(nbytes: float) -> str:
    """Return a number of bytes in the unit in which it is easily read."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return "?" if math.isnan(nbytes) else f"{nbytes / 1e3:.3g} kB"


def heading(data: Mapping[str, Any]) -> list[str]:
    """Return what a run was made on, in lines; `data` is what goes into its JSON."""
    on = data["machine"]
    memory, gpu = f"{on['memory_bytes'] / 2**30:.0f} GiB", data.get("gpu") or "no GPU"
    lines = [
        f"{on['cpu']}, {on['cores']} cores, {memory}, {gpu}",
        f"Linux {on['kernel']}; {on['file_system']}; huge pages: {on['huge_pages']}",
        ", ".join(f"{name} {number}" for name, number in data["versions"].items()),
    ]
    if state := data.get("state"):
        lines.append(f"State: {state['name']}, {size(state['bytes'])} in {state['tensors']} tensors, fp32")
    loads = f"{on['load_before']:.1f} before, {on['load_after']:.1f} after"
    took = data["seconds"]
    took = f"{took / 60:.0f} minutes" if took >= _MINUTES else f"{took:.0f} s"
    lines.append(f"Took {took}; load average {loads}")
    return [f"{line}  " for line in lines]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    drawn = ["|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines]
    return [drawn[0], "|" + "---|" * len(columns), *drawn[1:]]


def write_json(path: Path | None, data: Any) -> None:
    """Write the data of a run, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
