"""States that weights_only=True refuses to load: who is warned, of what, and when."""

from __future__ import annotations

import copyreg
import pickle
import re
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.serialization import safe_globals

import asyncckpt
from asyncckpt import Checkpointer, UnsafeStateError
from asyncckpt._inspection.refusals import Refused, listing
from asyncckpt._saving import weights_only
from asyncckpt._saving.weights_only import WeightsOnlyCheck
from asyncckpt._snapshot.freeze import Freezer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START = r"^weights_only=True, the default of load and restore, will refuse "
SCALAR: Any = np.float64(1).__reduce__()[0]

PATH = f"{PurePosixPath.__module__}.PurePosixPath"  # its module has another name in Python 3.13


@dataclass
class Config:
    value: Any = None


class OnlyHere:
    """Of a kind that no other test saves: those of asyncckpt.save are told once a process."""


class Tensor(torch.Tensor):
    """A subclass that torch's unpickler does not know."""


class MadeUp(type):
    """Makes classes that are pickled as calls of it."""


class Singleton:
    """Pickles by its name alone."""

    def __reduce__(self) -> str:
        return "SINGLETON"


SINGLETON = Singleton()


class Unreadable:
    """Its pickle gives attributes to a set, which has none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ([1],), {"a": 1}


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[Checkpointer]:
    with Checkpointer(tmp_path) as checkpointer:
        yield checkpointer


def warned(checkpointer: Checkpointer, step: int, state: Any) -> list[str]:
    """Save a state and return what is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpointer.save(step, state)
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("state", "refused"),
    [
        (
            {"best": np.float64(0.5)},
            r'state\["best"\] \(numpy\.\S+\.scalar, numpy\.dtype, numpy\S*Float64DType\)',
        ),
        ({"rng": np.random.get_state()}, r'state\["rng"\]\[1\] \(numpy\S+\._reconstruct, numpy\.ndarray'),  # noqa: NPY002
        ({"a": [1, {"it's": Config()}]}, r'state\["a"\]\[1\]\["it\'s"\] \(test_weights_only\.Config\)'),
        ({"q": deque([1])}, r'state\["q"\] \(collections\.deque, whose items cannot be allowed\)'),
        ({"d": defaultdict(list, a=[1])}, r'state\["d"\] \(collections\.defaultdict, whose items cannot be'),
        ({3: frozenset({1})}, r"state\[3\] \(builtins\.frozenset\)"),
        ({"empty": b""}, r'state\["empty"\] \(builtins\.bytes\)'),
        ({np.int64(3): 1}, r"state\[numpy\S+\.scalar\(.*\] \(numpy\S+\.scalar"),
        ({(PurePosixPath("a"), 1): 1}, rf"state\[\({PATH}.*\] \({PATH}\)"),
        (OrderedDict(a=Config(OrderedDict(b=1))), r'state\["a"\] \(test_weights_only\.Config\)'),
        ({"t": torch.ones(2).as_subclass(Tensor)}, r'state\["t"\] \(test_weights_only\.Tensor\)'),
        ({"s": SINGLETON}, r'state\["s"\] \(test_weights_only\.SINGLETON\)'),
        (Config(), r"state \(test_weights_only\.Config\)"),
    ],
)
def test_a_state_that_will_be_refused_is_warned_of_with_paths_and_remedies(
    checkpointer: Checkpointer, state: Any, refused: str
) -> None:
    (message,) = warned(checkpointer, 1, state)
    assert re.match(START + refused, message)
    assert re.search(
        r"weights_only=False, or save tensors .* torch\.serialization\.add_safe_globals$", message
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpointer.save(2, state).committed.result().path)


def test_what_will_be_loaded_is_not_warned_of(checkpointer: Checkpointer) -> None:
    model = torch.nn.Linear(2, 2)
    state = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "unsigned": torch.ones(2, dtype=torch.uint16),
        "shape": torch.Size([1, 2]),
        "dtype": torch.float32,
        "layout": torch.strided,
        "device": torch.device("cpu"),
        "ordered": OrderedDict(a=1),
        "counter": Counter("abca"),
        "plain": [None, True, 1, -(1 << 100), 0.5, 1j, "text", b"bytes", bytearray(b"b"), {1, 2}, (1,), ()],
        "c": "cos\nsystem\n",
    }
    assert warned(checkpointer, 1, state) == []
    checkpointer.load(1)


def test_each_kind_of_object_is_warned_of_once(checkpointer: Checkpointer, tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": Config(), "b": [Config(), Config()], "c": Config()}
    (first,) = warned(checkpointer, 1, state)
    assert 'state["a"], state["b"][0], state["b"][1] and 1 more (' in first
    assert warned(checkpointer, 2, state) == []
    state["later"] = PurePosixPath("x")
    (second,) = warned(checkpointer, 3, state)
    assert f'refuse state["later"] ({PATH}); load' in second
    assert warned(checkpointer, 4, state) == []
    with Checkpointer(tmp_path / "other") as other:
        assert len(warned(other, 1, state)) == 1


def test_many_kinds_are_cut_short() -> None:
    refused = {f"m.C{i}": Refused({f"m.C{i}": None}, {f"state[{i}]": None}) for i in range(12)}
    text = listing(refused)
    assert text.startswith("state[0] (m.C0); state[1] (m.C1); ")
    assert text.endswith("; state[9] (m.C9); and 2 more kinds")


def test_a_kind_that_came_with_a_save_that_failed_is_warned_of_later(checkpointer: Checkpointer) -> None:
    with pytest.raises(asyncckpt.UnpicklableStateError):
        checkpointer.save(1, {"a": Config(), "b": lambda: None})
    assert len(warned(checkpointer, 1, {"a": Config()})) == 1


def test_a_class_that_the_user_allows_is_not_warned_of(checkpointer: Checkpointer) -> None:
    state = {"a": Config([1])}
    with safe_globals([Config]):
        assert warned(checkpointer, 1, state) == []
        assert checkpointer.load(1) == state


def test_a_class_that_has_to_be_allowed_beside_the_one_in_the_pickle_is_named(
    checkpointer: Checkpointer,
) -> None:
    state = {"best": np.float64(0.5)}
    with safe_globals([SCALAR, np.dtype]):
        (message,) = warned(checkpointer, 1, state)
        assert re.match(START + r'state\["best"\] \(numpy.dtypes.Float64DType\);', message)
        with pytest.raises(UnsafeStateError, match="Float64DType"):
            checkpointer.load(1)
    with safe_globals([SCALAR, np.dtype, type(np.dtype("f8"))]):
        assert checkpointer.load(1) == state


def test_items_that_no_allowed_class_gets_back_are_warned_of(checkpointer: Checkpointer) -> None:
    with safe_globals([deque, defaultdict, list]):
        (message,) = warned(checkpointer, 1, {"q": deque([1]), "d": defaultdict(list, a=1), "e": deque()})
        assert re.match(
            START
            + r'state\["q"\] \(collections\.deque, whose items cannot be allowed\);'
            + r' state\["d"\] \(collections\.defaultdict, whose items cannot be allowed\); load',
            message,
        )


def test_a_part_of_an_object_that_is_refused_counts_to_that_object(checkpointer: Checkpointer) -> None:
    (message,) = warned(checkpointer, 1, {"a": Config({"x": deque(), "y": PurePosixPath("a")})})
    assert f'refuse state["a"] (test_weights_only.Config, collections.deque, {PATH});' in message


def test_functions_save_warns_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=START) as caught:
        asyncckpt.save({"new": OnlyHere()}, tmp_path / "a.pt")
    assert caught[0].filename == __file__
    asyncckpt.wait()


def test_a_warning_that_is_an_error_leaves_nothing_behind(checkpointer: Checkpointer, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=START):
            checkpointer.save(1, {"a": Config()})
        checkpointer.save(1, {"a": Config()})
    checkpointer.wait()
    assert len(list(tmp_path.iterdir())) == 1


def test_objects_of_a_class_that_a_call_makes_are_warned_of(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, MadeUp, lambda kind: (MadeUp, (kind.__name__, (), {})))
    (message,) = warned(checkpointer, 1, {"x": MadeUp("X", (), {})()})
    assert re.match(START + r'state\["x"\] \(.*test_weights_only\.MadeUp\)', message)


def test_a_pickle_that_cannot_be_looked_at_is_saved_and_warned_of_as_a_whole(
    checkpointer: Checkpointer,
) -> None:
    (message,) = warned(checkpointer, 1, {"a": Config(), "b": Unreadable()})
    assert re.match(START + r"state \(.*test_weights_only\.Config\);", message)
    checkpointer.wait()
    checkpointer.verify(1)


def test_nothing_is_looked_at_while_no_new_kind_of_object_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    freezer, check = Freezer(), WeightsOnlyCheck()
    state = {"w": torch.ones(3), "o": OrderedDict(a=torch.ones(3)), "c": Config(), "b": b"bytes"}
    assert check.warning(freezer.freeze(state)[0], freezer.kinds)
    monkeypatch.setattr(weights_only, "refused_globals", None)
    monkeypatch.setattr(weights_only, "read_pickle", None)
    state["more"] = [torch.ones(5), Config({"a": 1}), "text", b"bytes"]
    assert check.warning(freezer.freeze(state)[0], freezer.kinds) is None


def test_a_hundred_thousand_entries_are_looked_at_in_linear_time() -> None:
    def steps(count: int) -> int:
        freezer, calls = Freezer(), 0

        def count_call(*_: Any) -> None:
            nonlocal calls
            calls += 1

        frozen, _ = freezer.freeze({"l": [np.float64(i) for i in range(count)], "t": [torch.ones(1)] * count})
        sys.setprofile(count_call)
        try:
            check = WeightsOnlyCheck().warning(frozen, freezer.kinds)
        finally:
            sys.setprofile(None)
        assert check is not None
        return calls

    assert steps(4000) < 2.5 * steps(2000)
