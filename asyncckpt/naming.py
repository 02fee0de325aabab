"""File names of checkpoints: a template over the step and the metrics."""

from __future__ import annotations

import re
from string import Formatter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


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
        pieces = [re.escape(text) + ("" if field is None else ".*") for text, field, _, _ in parsed]
        self._pattern = re.compile("".join(pieces), re.DOTALL)

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

    def matches(self, name: str) -> bool:
        """Whether `name` may have been made by this template."""
        return self._pattern.fullmatch(name) is not None
