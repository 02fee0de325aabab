"""File names of checkpoints: a template over the step and the metrics."""

from __future__ import annotations

import re
from string import Formatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncckpt.types import Checkpoint

# Of checkpoints, whoever wrote them.
SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors"})

_WHOLE = re.compile(r"(0\d*)?d?")  # formats that leave a step its digits
_DIGITS = r"-?\d+"
_STEP = rf"(?P<step>{_DIGITS})"


class NameTemplate:
    """A template such as `step-{step:08d}-{val_loss:.3f}.pt`.

    A metric whose name holds characters other than letters, digits and `_` goes by its flattened name:
    `val/loss` is `{val_loss}`.

    Raises:
        ValueError: the template does not parse, or would put files into other directories.
    """

    def __init__(self, template: str) -> None:
        try:
            parsed = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"filename={template!r}: {error}") from error
        if "/" in template or not template or template.startswith("."):
            msg = f"filename={template!r} must be the name of one visible file"
            raise ValueError(f"{msg}; a folder belongs into the directory")
        self.template = template
        pieces = [re.escape(text) + _values(field, spec) for text, field, spec, _ in parsed]
        # All after the first step is the same step: the group may be named once only.
        first, *rest = "".join(pieces).split(_STEP)
        self._pattern = re.compile(first + (_STEP + _DIGITS.join(rest) if rest else ""), re.DOTALL)

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
            msg = (
                f"filename={self.template!r} needs the metric {error}; given were {sorted(metrics) or 'none'}"
            )
            raise ValueError(msg) from None
        except (ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"filename={self.template!r}: {error}") from error
        return name.replace("/", "_")

    def owns(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is of the series that this template names.

        The file says which template named it. One of an older version does not: then its name has to be what
        this template makes of its step and metrics. That is asked of all, so that a copy under another name
        is of no series.
        """
        if checkpoint.step is None or checkpoint.filename not in {None, self.template}:
            return False
        try:
            name = self.name(checkpoint.step, checkpoint.metrics)
        except ValueError:
            return False
        return name == checkpoint.path.rpartition("/")[2]

    def matches(self, name: str) -> bool:
        """Return whether this template may have made `name`: all there is to ask of a damaged file."""
        return self._pattern.fullmatch(name) is not None

    def step_of(self, name: str) -> int | None:
        """Return the step in a file name, if this template may have made it and shows the step."""
        found = self._pattern.fullmatch(name)
        return int(found["step"]) if found and "step" in self._pattern.groupindex else None


def _values(field: str | None, spec: str | None) -> str:
    """Return a regular expression for what a field of a template is replaced with."""
    if field is None:
        return ""
    return _STEP if field == "step" and _WHOLE.fullmatch(spec or "") else ".+"
