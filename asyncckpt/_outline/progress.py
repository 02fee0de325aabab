"""What a state tells about the training it belongs to, by the customs of those who write such states."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncckpt._outline.nodes import OrderedDictOutline, TensorOutline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LIGHTNING = "pytorch-lightning_version"
_STEPS = ("global_step", "step", "iteration")
_METRIC = re.compile(r"(?:^|[^a-z])(?:loss|acc|accuracy)(?:$|[^a-z])", re.IGNORECASE)
# More than anyone would look at: a state with so many entries that sound like metrics is something else.
_MAX_METRICS = 50
_MAX_INTEGER = 1 << 63


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training had come.

    Attributes:
        lightning: the version of Lightning that made the state; None if none did.
        step, epoch: as the state tells them.
        metrics: numbers, and tensors of one element, by name.
    """

    lightning: str | None = None
    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float | TensorOutline] = field(default_factory=dict)


def progress_of(root: Any) -> Progress:
    """Return what a state tells."""
    if type(root) not in {dict, OrderedDictOutline}:
        return Progress()
    version = root.get(_LIGHTNING)
    lightning = version if type(version) is str else None
    told = _lightning_scores(root.get("callbacks")) if lightning else _metrics(root)
    metrics = {name: value for name, value in told if _is_number(value)}
    step = next((root[name] for name in _STEPS if _is_integer(root.get(name))), None)
    epoch = root.get("epoch")
    return Progress(
        lightning,
        step,
        epoch if _is_integer(epoch) else None,
        metrics if len(metrics) <= _MAX_METRICS else {},
    )


def _lightning_scores(callbacks: Any) -> Iterator[tuple[str, Any]]:
    """Yield the scores that checkpoint callbacks note of this very checkpoint."""
    for state in callbacks.values() if type(callbacks) is dict else ():
        if type(state) is dict and type(state.get("monitor")) is str:
            yield state["monitor"], state.get("current_score")


def _metrics(root: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the entries that are metrics by their name, or by that of the dict that holds them."""
    metrics = root.get("metrics")
    for name, value in metrics.items() if type(metrics) is dict else ():
        if type(name) is str:
            yield name, value
    for name, value in root.items():
        if type(name) is str and _METRIC.search(name):
            yield name, value


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_integer(value) or (type(value) is TensorOutline and value.numel == 1)


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < _MAX_INTEGER
