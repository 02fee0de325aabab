"""Draw the table of a run from its data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SIGNS = {"<=": "≤", ">=": "≥"}


def draw(data: Mapping[str, Any]) -> str:
    """Return what is shown of a run, whose data are those that go into the JSON."""
    return "\n".join([*_heading(data), "", *_table(data["rows"]), "", *_closing(data)])


def _heading(data: Mapping[str, Any]) -> Iterator[str]:
    machine, state = data["machine"], data["state"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    yield f"{machine['cpu']}, {machine['cores']} cores, {memory}, Linux {machine['kernel']}"
    yield f"{machine['file_system']}; huge pages: {machine['huge_pages']}"
    yield ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    yield f"State: {state['name']}, {state['bytes'] / 1e9:.3g} GB in {state['tensors']} tensors, fp32, CPU"
    loads = f"{machine['load_before']:.1f} before, {machine['load_after']:.1f} after"
    yield f"Took {data['seconds']:.0f} s; load average {loads}"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'':<48}{'target':>16}{'measured':>17}{'(least … greatest)':>21}"
    for row in rows:
        target = f"{SIGNS[row['relation']]} {row['limit']:g} {row['unit']}"
        measured = f"{_number(row['value'])} {row['unit']}"
        spread = f"({_number(row['low'])} … {_number(row['high'])})"
        yield f"{row['what']:<48}{target:>16}{measured:>17}{spread:>21}  {_verdict(row)}"
        for detail in row["details"]:
            yield f"      {detail}"


def _closing(data: Mapping[str, Any]) -> Iterator[str]:
    met = sum(row["met"] for row in data["rows"])
    yield f"{met} of {len(data['rows'])} met. Medians; least and greatest are those of single repetitions."
    if data["options"]["quick"]:
        yield "A quick run with a small state: it shows that the measuring works, not what is reached."


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _verdict(row: Mapping[str, Any]) -> str:
    if row["met"]:
        return "met"
    return f"MISSED: {row['value'] / row['limit']:.2f} of the target"
