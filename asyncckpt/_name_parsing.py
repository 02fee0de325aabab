"""Read steps and metrics back from file names, and guess the template that made them."""

from __future__ import annotations

import re
from collections import defaultdict
from string import Formatter
from typing import TYPE_CHECKING

from asyncckpt._naming import NameTemplate
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

_NUMBER = r"( *[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf|NAN|INF))"
_TOKEN = re.compile(r"(\d+\.\d+|\d+)")
_STEP = re.compile(r"(step|iter|iteration)s?[=_-]?$", re.IGNORECASE)
_WORD = re.compile(r"([A-Za-z][A-Za-z0-9_]*?)[=_:-]?$")


class NameParser:
    """Reads what a template has put into a name.

    Args:
        names: the template.

    Raises:
        ValueError: it shows no step.
    """

    def __init__(self, names: NameTemplate) -> None:
        self.names = names
        parsed = list(Formatter().parse(names.template))
        self._fields = [field for _, field, _, _ in parsed if field is not None]
        if "step" not in self._fields:
            raise ValueError(f"filename={names.template!r} shows no step; use {{step}} or {{step:08d}} in it")
        pieces = [re.escape(text) + ("" if field is None else _NUMBER) for text, field, _, _ in parsed]
        self._pattern = re.compile("".join(pieces), re.DOTALL)

    def read(self, name: str) -> Checkpoint | None:
        """Return the step and the metrics in a name; None if the template does not make this name of them."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        texts = dict(zip(self._fields, found.groups(), strict=True))
        try:
            step = int(texts.pop("step"))
        except ValueError:
            return None
        metrics = {field: float(text) for field, text in texts.items()}
        checkpoint = Checkpoint(step, name, metrics, filename=self.names.template)
        return checkpoint if self.names.owns(checkpoint) else None


def guess_template(names: Sequence[str]) -> str | None:
    """Return a template that makes most of `names`, for different steps; None if none is found.

    What varies is the step and, if there are more numbers than one, metrics.
    """
    shapes: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in sorted(names):
        pieces: list[str] = _TOKEN.split(name)
        shapes[tuple(pieces[::2])].append(pieces)
    for alike in sorted(shapes.values(), key=len, reverse=True):
        template = _template_of(alike)
        if template is not None:
            return template
    return None


def _template_of(names: Sequence[Sequence[str]]) -> str | None:
    """Return the template of names that differ in numbers alone: text and number by turns."""
    columns = [list(column) for column in zip(*names, strict=True)]
    at = _step_column(columns)
    if at is None:
        return None
    taken = {"step"}
    parts = []
    for index, column in enumerate(columns):
        if index == at:
            parts.append("{step" + _width(column) + "}")
        elif len(set(column)) == 1:
            parts.append(column[0].replace("{", "{{").replace("}", "}}"))
        else:
            word = _WORD.search(columns[index - 1][0])
            field = word[1] if word is not None else "metric"
            field = next(
                name for name in (field, *(f"{field}{n}" for n in range(2, 99))) if name not in taken
            )
            taken.add(field)
            parts.append(f"{{{field}:.{len(column[0].partition('.')[2])}f}}")
    try:
        parser = NameParser(NameTemplate("".join(parts)))
    except ValueError:  # of a hidden file
        return None
    return parser.names.template if all(parser.read("".join(name)) for name in names) else None


def _step_column(columns: Sequence[Sequence[str]]) -> int | None:
    """Return which of the numbers is the step: one that is called so, or the last whole one that varies."""
    whole = [index for index in range(1, len(columns), 2) if all(map(str.isdecimal, columns[index]))]
    varying = [index for index in whole if len(set(columns[index])) > 1] or whole
    called = [index for index in varying if _STEP.search(columns[index - 1][0])]
    return next(reversed(called or varying), None)


def _width(numbers: Sequence[str]) -> str:
    """Return the format of numbers: their width where one begins with a zero."""
    padded = [len(number) for number in numbers if number.startswith("0") and number != "0"]
    return f":0{padded[0]}d" if padded else ""
