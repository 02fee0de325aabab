"""The child process that reads foreign pickles: no torch, and limits that the system enforces.

`isolation` starts it. Pickles come on stdin, one JSON document goes to stdout.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import sys
from contextlib import suppress
from itertools import repeat
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.comparing import compare, json_path, json_tensor, json_value
from asyncckpt._inspection.folder_state import folder_state
from asyncckpt._inspection.inert import Attribute, Inert, Pickled, Tensor, children, is_leaf, read_pickle
from asyncckpt._inspection.texts import path_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncckpt._inspection.inert import Path

_LONGEST_REASON = 500
_DEPTH = 3000  # torch.save itself goes a thousand levels deep at most

# Keys of states under which training loops keep their progress.
_LIGHTNING = "pytorch-lightning_version"
_STEPS = ("global_step", "step", "iteration")
_METRIC = re.compile(r"(?:^|[^a-z])(?:loss|acc|accuracy)(?:$|[^a-z])", re.IGNORECASE)
# More than anyone would look at: a state with so many entries that sound like metrics is something else.
_MAX_METRICS = 50
_MAX_INTEGER = 1 << 63


def main(task: str, memory: int, seconds: int, length: int) -> None:
    """Print what is in the pickles on stdin, or {"error": …, "pickle": which}, as JSON.

    Args:
        task: `progress` or `contents` of one pickle, `each` for the contents of each of several, `tensors` of
            pickles that are one each, `differences` of two states, or `nothing` but reading them.
        memory: how much address space this process may take.
        seconds: how much processor time; four times as much may pass.
        length: of the JSON that precedes the pickles: their sizes in bytes, what they are called, and for
            `differences` of each state the entries as `folder_state` takes them, or null if it is one pickle.
    """
    _limit(memory, seconds)
    sys.setrecursionlimit(_DEPTH)
    gc.disable()
    pickles: list[Pickled] = []
    result: dict[str, Any]
    header = json.loads(sys.stdin.buffer.read(length))
    sizes = header["sizes"]
    try:
        for size, prefix in zip(sizes, _prefixes(header["states"]), strict=False):
            pickles.append(read_pickle(sys.stdin.buffer.read(size), prefix=prefix))
        result = _done(task, pickles, header)
    except MemoryError:
        os._exit(1)
    except RecursionError:
        result = {"error": "its state is nested too deep to be looked at"}
    except Exception as error:  # noqa: BLE001 - whatever a damaged pickle comes to
        reason = str(error)[:_LONGEST_REASON] or type(error).__name__
        result = {"error": f"its {header['record']} is damaged: {reason}"}
    result["pickle"] = min(len(pickles), len(sizes) - 1)
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # taking the state apart is not worth the time


def _prefixes(states: list[Any]) -> Iterator[str]:
    """Yield a prefix for the storages of each pickle: in a folder, each entry has storages of its own."""
    for entries in states:
        count = sum(len(entry) == 1 for entry in entries or ())
        yield from [""] if entries is None else [f"{number}/" for number in range(count)]
    yield from repeat("")


def _done(task: str, pickles: list[Pickled], header: dict[str, Any]) -> dict[str, Any]:
    if task == "differences":
        roots = iter([pickled.root for pickled in pickles])
        states = [next(roots) if of is None else folder_state(of, roots) for of in header["states"]]
        return compare(states[0], states[1], flattened=any(of is not None for of in header["states"]))
    if task == "nothing":
        return {}
    if task == "tensors":
        return {"tensors": [_tensor_in(pickled) for pickled in pickles]}
    if task == "each":
        return {"each": [_contents(pickled) for pickled in pickles]}
    result = {"progress": _progress(pickles[0].root)}
    return result | _contents(pickles[0]) if task == "contents" else result


def _tensor_in(pickled: Pickled) -> list[Any]:
    if not isinstance(pickled.root, Tensor):
        raise TypeError("it is not one tensor")
    return json_tensor(pickled.root)


def _limit(memory: int, seconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.alarm(4 * seconds)
    limits = {"AS": memory, "CPU": seconds, "FSIZE": 0, "CORE": 0, "NOFILE": 0, "NPROC": 0}
    for name, limit in limits.items():
        with suppress(OSError, ValueError, AttributeError):  # not every system has, or lowers, each of them
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _contents(pickled: Pickled) -> dict[str, Any]:
    tensors, values = [], []
    for path, node in _leaves((), pickled.root, {}):
        if isinstance(node, Tensor):
            tensors.append([json_path(path), json_tensor(node)])
        elif Attribute not in map(type, path):
            is_repeated = type(node) is _Repeated
            value = {"text": f"same as {path_text(node)}"} if is_repeated else json_value(node)
            values.append({"path": json_path(path), **value})
    named = {"storages": pickled.storages, "globals": pickled.globals}
    return {"tensors": tensors, "values": values, **named}


class _Repeated(tuple[Any, ...]):
    """The path where something was met before."""

    __slots__ = ()


def _leaves(path: Path, node: Any, met: dict[int, Path]) -> Iterator[tuple[Path, Any]]:
    """Yield each leaf and the path to it, in order; objects and tensors before what is in them.

    What was met before is not entered again: in its place comes a _Repeated.
    """
    is_tensor = isinstance(node, Tensor)
    if is_tensor or is_leaf(node):
        yield path, node
        if not is_tensor or node.state is None or id(node) in met:
            return
    elif id(node) in met:
        yield path, _Repeated(met[id(node)])
        return
    elif isinstance(node, Inert):
        yield path, node
    met[id(node)] = path
    for key, part in children(node):
        yield from _leaves((*path, key), part, met)


def _progress(root: Any) -> dict[str, Any]:
    """Return the step, the epoch and the metrics that a state has under their usual keys."""
    if not isinstance(root, dict):
        return {}
    version = root.get(_LIGHTNING)
    lightning = version if type(version) is str else None
    found = _lightning_scores(root.get("callbacks")) if lightning else _metrics(root)
    metrics = {
        name: json_tensor(value) if isinstance(value, Tensor) else value
        for name, value in found
        if type(value) is float or _is_integer(value) or (isinstance(value, Tensor) and value.numel == 1)
    }
    epoch = root.get("epoch")
    return {
        "lightning": lightning,
        "step": next((root[name] for name in _STEPS if _is_integer(root.get(name))), None),
        "epoch": epoch if _is_integer(epoch) else None,
        "metrics": metrics if len(metrics) <= _MAX_METRICS else {},
    }


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


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < _MAX_INTEGER
