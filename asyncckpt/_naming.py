"""File names of checkpoints: made from a template, read back, and the template guessed from names."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import count
from string import Formatter
from typing import TYPE_CHECKING

from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Of checkpoints, whoever wrote them.
SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors"})

_PLAIN_STEP = re.compile(r"(0\d*)?d?")  # formats that show a step by its digits
_NUMBER = r"( *[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf|NAN|INF))"
_TOKEN = re.compile(r"(\d+\.\d+|\d+)")
_STEP_WORD = re.compile(r"(step|iter|iteration)s?[=_-]?$", re.IGNORECASE)
_WORD = re.compile(r"([A-Za-z][A-Za-z0-9_]*?)[=_:-]?$")


class NameTemplate:
    """A template such as `step-{step:08d}-{val_loss:.3f}.pt`.

    A metric whose name holds characters other than letters, digits and `_` goes by its flattened name:
    `val/loss` is `{val_loss}`.

    Raises:
        ValueError: the template does not parse, or would put files into other directories.
    """

    def __init__(self, template: str) -> None:
        try:
            self.pieces = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"filename={template!r}: {error}") from error
        if "/" in template or not template or template.startswith("."):
            msg = f"filename={template!r} must be the name of one visible file"
            raise ValueError(f"{msg}; a folder belongs into the directory")
        self.template = template
        ending = self.pieces[-1][0] if self.pieces[-1][1] is None else ""
        # What is left out of the name of a folder, as nothing opens it by its suffix.
        self._suffix = next((suffix for suffix in sorted(SUFFIXES) if ending.endswith(suffix)), "")
        pattern = ""
        for text, field, spec, _ in self.pieces:
            pattern += re.escape(text)
            if field == "step" and _PLAIN_STEP.fullmatch(spec or ""):
                pattern += r"-?\d+" if "(?P<step>" in pattern else r"(?P<step>-?\d+)"
            elif field is not None:
                pattern += ".+"
        if self._suffix:
            end = re.escape(self._suffix)
            pattern = f"{pattern.removesuffix(end)}(?:{end})?"
        self._pattern = re.compile(pattern, re.DOTALL)

    def name(self, step: int, metrics: Mapping[str, float]) -> str:
        """Return the name of a checkpoint.

        Raises:
            ValueError: a metric of the template was not given, or cannot be formatted as it says.
        """
        values: dict[str, float] = {re.sub(r"\W", "_", key): value for key, value in metrics.items()}
        values["step"] = step
        try:
            name = self.template.format_map(values)
        except KeyError as error:
            given = sorted(metrics) or "none"
            msg = f"filename={self.template!r} needs the metric {error}; given were {given}"
            raise ValueError(msg) from None
        except (ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"filename={self.template!r}: {error}") from error
        return name.replace("/", "_")

    def folder_name(self, step: int, metrics: Mapping[str, float]) -> str:
        """Return the name of a checkpoint of many ranks: without the suffix, if it is one of SUFFIXES.

        Raises:
            ValueError: as `name` does.
        """
        return self.name(step, metrics).removesuffix(self._suffix)

    def owns(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint belongs to the series of this template.

        The file says which template named it, unless an older version wrote it. Its name must also be what
        this template makes of its step and metrics: a copy under another name belongs to no series.
        """
        if checkpoint.step is None or checkpoint.filename not in {None, self.template}:
            return False
        try:
            name = self.name(checkpoint.step, checkpoint.metrics)
        except ValueError:
            return False
        return checkpoint.path.rpartition("/")[2] in {name, name.removesuffix(self._suffix)}

    def matches(self, name: str) -> bool:
        """Return whether `name` may be of this template: all that is known of a damaged checkpoint."""
        return self._pattern.fullmatch(name) is not None

    def step_of(self, name: str) -> int | None:
        """Return the step in a name, if this template may have made it and shows the step."""
        found = self._pattern.fullmatch(name)
        return int(found["step"]) if found and "step" in self._pattern.groupindex else None


class NameParser:
    """Reads what a template has put into a name.

    Args:
        names: the template.

    Raises:
        ValueError: it shows no step.
    """

    def __init__(self, names: NameTemplate) -> None:
        self.names = names
        self._fields = [field for _, field, _, _ in names.pieces if field is not None]
        if "step" not in self._fields:
            raise ValueError(f"filename={names.template!r} shows no step; use {{step}} or {{step:08d}} in it")
        pieces = [re.escape(text) + ("" if field is None else _NUMBER) for text, field, _, _ in names.pieces]
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
        pieces: list[str] = _TOKEN.split(name)  # text and number by turns
        shapes[tuple(pieces[::2])].append(pieces)
    guesses = map(_template_of, sorted(shapes.values(), key=len, reverse=True))
    return next((guess for guess in guesses if guess is not None), None)


def _template_of(names: Sequence[Sequence[str]]) -> str | None:
    """Return the template of split names that differ in numbers alone."""
    columns = [list(column) for column in zip(*names, strict=True)]
    # The step is the number that is called so, or the last whole one that varies.
    whole = [index for index in range(1, len(columns), 2) if all(map(str.isdecimal, columns[index]))]
    varying = [index for index in whole if len(set(columns[index])) > 1] or whole
    called = [index for index in varying if _STEP_WORD.search(columns[index - 1][0])]
    if not varying:
        return None
    step = (called or varying)[-1]
    taken, template = {"step"}, ""
    for index, column in enumerate(columns):
        if index == step:
            padded = [len(number) for number in column if number.startswith("0") and number != "0"]
            template += f"{{step:0{padded[0]}d}}" if padded else "{step}"
        elif len(set(column)) == 1:
            template += column[0].replace("{", "{{").replace("}", "}}")
        else:
            word = _WORD.search(columns[index - 1][0])
            base = word[1] if word is not None else "metric"
            field = next(f for n in count(1) if (f := base if n == 1 else f"{base}{n}") not in taken)
            taken.add(field)
            template += f"{{{field}:.{len(column[0].partition('.')[2])}f}}"
    try:
        parser = NameParser(NameTemplate(template))
    except ValueError:  # of a hidden file
        return None
    return template if all(parser.read("".join(name)) for name in names) else None
