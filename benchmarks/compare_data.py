"""The runs of a comparison, put together by what was measured, in which state, of which peer."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

OWN = "asyncckpt"
TITLES = {"gpt2": "GPT-2 124 M + Adam", "resnet": "ResNet-50 + SGD", "lora": "LoRA adapters + Adam"}


class Found:
    """What a comparison has found.

    Args:
        data: what `compare.py` writes.

    Attributes:
        data: the same.
        peers: key -> name, package and version, in order of presentation.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.peers: dict[str, dict[str, Any]] = data["peers"]
        self._samples: defaultdict[tuple[str, str, str], dict[str, list[Any]]] = defaultdict(dict)
        self._errors: dict[tuple[str, str, str], str] = {}
        for run in data["runs"]:
            place = run["kind"], run["state"], run["peer"]
            if "error" in run:
                self._errors[place] = run["error"]
            for name, values in run.get("samples", {}).items():
                self._samples[place].setdefault(name, []).extend(values)

    def of(self, kind: str, state: str, peer: str, name: str) -> list[Any]:
        """Return the samples of one figure, of all processes that measured it; empty if there are none."""
        return self._samples.get((kind, state, peer), {}).get(name, [])

    def middle(self, kind: str, state: str, peer: str, name: str) -> float:
        """Return the median of the samples; NaN if there are none."""
        values = self.of(kind, state, peer, name)
        return float(median(values)) if values else math.nan

    def error(self, kind: str, state: str, peer: str) -> str | None:
        """Return what a measurement failed with."""
        return self._errors.get((kind, state, peer))

    def copy(self, state: str) -> float:
        """Return the median of the plain copies into warm buffers, of all processes that made one."""
        values = [
            value
            for (_, where, _), samples in self._samples.items()
            if where == state
            for value in samples.get("copy_s", [])
        ]
        return median(values) if values else math.nan

    def states(self, kind: str) -> list[str]:
        """Return the states in which something was measured, in the order in which it was."""
        return list(dict.fromkeys(run["state"] for run in self.data["runs"] if run["kind"] == kind))

    def points(self, of: str) -> list[str]:
        """Return the points of the growth curve "bytes", "tensors" or "kept", as they were measured."""
        states = dict.fromkeys(run["state"] for run in self.data["runs"])
        return [state for state in states if state.startswith(f"{of}:")]

    def main_states(self) -> list[str]:
        """Return the states that stand for a training, not for a size."""
        measured = dict.fromkeys(
            state for kind in ("saves", "loads", "memory") for state in self.states(kind)
        )
        return [state for state in measured if not is_point(state)]

    def measured(self, kind: str, state: str, peer: str) -> bool:
        """Whether something was measured, or failed."""
        return (kind, state, peer) in self._samples or (kind, state, peer) in self._errors

    def own(self, peer: str) -> bool:
        """Whether this is one of asyncckpt's own ways."""
        return bool(self.peers[peer]["package"] == OWN)

    def label(self, peer: str) -> str:
        """Return how a peer is called in tables: its name and, if it is another package's, the version."""
        about = self.peers[peer]
        return str(about["name"]) if self.own(peer) else f"{about['name']} ({about['version']})"


def is_point(state: str) -> bool:
    """Whether a state is a point of a growth curve."""
    return state.startswith(("bytes:", "tensors:", "kept:"))


def title(state: str) -> str:
    """Return how a state is called."""
    return TITLES.get(state, state.removeprefix("file:").rpartition("/")[2])


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least sample that is not below `share` of all (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def read(path: Path) -> Found:
    """Read the JSON of a comparison."""
    return Found(json.loads(path.read_text(encoding="utf-8")))


def encoded(data: Mapping[str, Any]) -> str:
    """Return the JSON of a comparison, a run a line: so that what changed between two of them can be seen."""
    head = {key: value for key, value in data.items() if key != "runs"}
    runs = ",\n".join(json.dumps(run, ensure_ascii=False) for run in data["runs"])
    text = json.dumps(head, ensure_ascii=False, indent=1)
    return f'{text[:-2]},\n "runs": [\n{runs}\n]}}\n'
