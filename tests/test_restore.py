"""A checkpoint goes into live objects: all of it, or nothing."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer, StateMismatchError
from asyncckpt._loading.restore import restore
from restoring import Counter, meaning, trained
from sameness import assert_same
from support import flip, payload_offset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def ckpt(tmp_path: Path) -> Iterator[Checkpointer]:
    with Checkpointer(tmp_path) as ckpt:
        yield ckpt


class Picky(nn.Linear):
    """A module whose own loading refuses after it has loaded."""

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        result = super().load_state_dict(*args, **options)
        if self.bias[0] == 7:
            raise RuntimeError("not this one")
        return result


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
def test_a_loaded_state_is_freed_after_it_is_copied_by_a_module_with_hooks() -> None:
    model = nn.Linear(2, 2)
    model.register_load_state_dict_post_hook(lambda *_: None)
    content = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = weakref.ref(content["weight"])
    restore(model, content, "file.pt")
    del content
    assert loaded() is None


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.filterwarnings("ignore:.*damaged:UserWarning")
def test_a_loaded_state_is_freed_after_a_fallback(ckpt: Checkpointer, tmp_path: Path) -> None:
    for step in (1, 2):
        ckpt.save(step, {"x": torch.full((3,), float(step))}).committed.result(30)
    path = tmp_path / "step-00000002.pt"
    flip(path, payload_offset(path, "data/0") + 5)
    state = ckpt.load(fallback=True)
    loaded = weakref.ref(state["x"])
    assert state["x"].tolist() == [1, 1, 1]
    del state
    assert loaded() is None


def test_new_objects_are_restored_in_place(ckpt: Checkpointer) -> None:
    saved = trained(steps=3)
    ckpt.save(3, saved)
    live = trained(steps=0, seed=1)
    assert live["opt"].state_dict()["state"] == {}
    parameters = [parameter.data_ptr() for parameter in live["model"].parameters()]
    found = ckpt.restore(live)
    assert found == ckpt.latest()
    assert_same(meaning(live), meaning(saved))
    assert [parameter.data_ptr() for parameter in live["model"].parameters()] == parameters
    assert live["opt"].param_groups[0]["params"][0] is live["model"][0].weight
    assert live["step"] == 3


def test_live_tensors_do_not_share_memory_with_the_loaded_state(ckpt: Checkpointer) -> None:
    ckpt.save(1, {"model": nn.Linear(2, 2), "x": torch.zeros(2)})
    live: list[dict[str, Any]] = [{"model": nn.Linear(2, 2), "x": torch.ones(2)} for _ in range(2)]
    for state in live:
        ckpt.restore(state)
    with torch.no_grad():
        live[0]["model"].weight.add_(1)
        live[0]["x"].add_(1)
    assert not torch.equal(live[0]["model"].weight, live[1]["model"].weight)
    assert live[1]["x"].tolist() == [0, 0]


def test_nested_tensors_change_in_place_and_values_are_replaced(ckpt: Checkpointer) -> None:
    def state(value: float) -> dict[Any, Any]:
        tensor = torch.full((4, 6), value)
        return {
            "n": value,
            "none": None if value else 1,
            "deep": {
                "list": [torch.full((2,), value), [value, {"x": torch.tensor(value)}], Counter(int(value))]
            },
            "strided": tensor.t()[::2],
            "tuple": (value, "a"),
            5: torch.full((2,), value, dtype=torch.bfloat16),
        }

    saved, live = state(2), state(0)
    identities = live["deep"], live["deep"]["list"], live["deep"]["list"][2]
    tensors = [live["deep"]["list"][0], live["deep"]["list"][1][1]["x"], live["strided"], live[5]]
    ckpt.save(1, saved)
    ckpt.restore(live)
    assert (live["deep"], live["deep"]["list"], live["deep"]["list"][2]) == identities
    assert [live["deep"]["list"][0], live["deep"]["list"][1][1]["x"], live["strided"], live[5]] == tensors
    assert live["n"] == 2
    assert live["none"] is None
    assert live["tuple"] == (2, "a")
    assert live["deep"]["list"][1][0] == live["deep"]["list"][2].count == 2
    assert all((tensor == 2).all() for tensor in tensors)
    assert live["strided"].stride() == (2, 6)
    assert live["strided"]._base is not None
    assert (live["strided"]._base == torch.tensor([2.0, 0] * 3)).all()


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda items: defaultdict(list, items)])
def test_stateful_objects_are_found_in_every_kind_of_dict(
    ckpt: Checkpointer, make: Callable[[Any], dict[str, Any]]
) -> None:
    ckpt.save(1, make({"outer": make({"counter": Counter(5)}), "list": [make({"model": nn.Linear(1, 1)})]}))
    live = make({"outer": make({"counter": Counter(0)}), "list": [make({"model": nn.Linear(1, 1)})]})
    ckpt.restore(live, weights_only=False)
    assert live["outer"]["counter"].count == 5
    assert torch.equal(
        live["list"][0]["model"].weight, ckpt.load(weights_only=False)["list"][0]["model"]["weight"]
    )
    assert type(ckpt.load(weights_only=False)) is type(live)


def test_a_stateful_object_itself_can_be_the_state(ckpt: Checkpointer) -> None:
    ckpt.save(1, Counter(4))
    live = Counter(0)
    ckpt.restore(live)
    assert live.count == 4


def test_every_mismatch_is_listed_and_nothing_is_changed(ckpt: Checkpointer) -> None:
    saved = {
        "model": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)),
        "x": torch.ones(3),
        "lost": 1,
        "deep": {"list": [torch.ones(1), 2], "kind": {"a": 1}, "gone": torch.ones(1)},
        "good": torch.ones(2),
        "counter": Counter(9),
        "opt": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
        "step": 8,
    }
    live = {
        "model": nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 3, bias=False)),
        "x": torch.zeros(4),
        "new": 1,
        "deep": {"list": [torch.zeros(1)], "kind": torch.zeros(1), "gone": torch.zeros(1)},
        "good": torch.zeros(2),
        "counter": Counter(0),
        "opt": torch.optim.SGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], lr=0.1),
        "step": 0,
    }
    ckpt.save(1, saved)
    before = meaning(live)
    with pytest.raises(StateMismatchError) as told:
        ckpt.restore(live)
    assert_same(meaning(live), before)
    lines = str(told.value).split("\n  ")
    assert lines[0].endswith("step-00000001.pt does not fit the state, of which nothing was changed:")
    assert set(lines[1:]) == {
        'state["new"]: missing in the checkpoint',
        'state["lost"]: unexpected, the state has no such entry',
        'state["model"]["0.weight"]: shape (3, 2) in the checkpoint, (4, 2) in the state',
        'state["model"]["0.bias"]: shape (3,) in the checkpoint, (4,) in the state',
        'state["model"]["1.bias"]: unexpected, the module has no such entry',
        'state["x"]: shape (3,) in the checkpoint, (4,) in the state',
        'state["deep"]["list"]: a list of 1 is expected, the checkpoint has one of 2',
        'state["deep"]["kind"]: a tensor is expected, the checkpoint has a dict',
        'state["opt"]: [1] parameters per group in the checkpoint, [2] in the optimizer',
    }


def frozen_parameter() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (Counter(3), Counter(0, refuses=3)),
        ({"count": "x", "more": 1}, Counter(0, refuses="x")),
        ({"weight": torch.zeros(2, 2), "bias": torch.full((2,), 7.0)}, Picky(2, 2)),
        ({"weight": torch.zeros(2, 2), "bias": 7.0}, nn.Linear(2, 2)),
        ({"weight": torch.zeros(2, 2), "bias": None}, nn.Linear(2, 2)),
        ({"weight": torch.zeros(2, 2).to(torch.complex64), "bias": torch.zeros(2)}, nn.Linear(2, 2)),
        (7.0, nn.Linear(2, 2)),
        (torch.ones(3), torch.zeros(1).expand(3)),
        (torch.ones(3), frozen_parameter()),
        (torch.ones(3), torch.zeros(3, device="meta")),
        (torch.ones(3).to_sparse(), torch.zeros(3)),
        (torch.ones(3), torch.ones(3).to_sparse()),
        (torch.ones(3, device="meta"), torch.zeros(3)),
        ({"weight": torch.zeros(2, 2).to_sparse(), "bias": torch.zeros(2)}, nn.Linear(2, 2)),
        ({"state": {}, "param_groups": []}, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)),
        ({"state": {}, "param_groups": [{}]}, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)),
        ([], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)),
        ({"a": 1}, (1, 2)),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_an_entry_that_cannot_be_loaded_leaves_the_state_unchanged(
    ckpt: Checkpointer,
    saved: Any,
    live: Any,
    first: bool,  # noqa: FBT001 - a parameter of a test
) -> None:
    """Whether it comes before or after all that could be loaded, or it is put in as it stands."""

    def state(odd: Any, value: int) -> dict[str, Any]:
        others = {
            "counter": Counter(value),
            "model": nn.Linear(2, 2),
            "x": torch.full((3,), float(value)),
            "n": value,
            "late": Picky(2, 2),
        }
        return {"odd": odd, **others} if first else {**others, "odd": odd}

    target = state(live, 0)
    before = meaning(target)
    ckpt.save(1, state(saved, 1))
    try:
        ckpt.restore(target)
    except StateMismatchError as told:
        assert 'state["odd"]' in str(told)  # noqa: PT017 - some of these may be taken
        if not (isinstance(live, torch.Tensor) and live.is_meta):
            assert_same(meaning(target), before)
    else:
        assert target["n"] == 1
        assert target["counter"].count == 1
        if isinstance(live, tuple):
            assert target["odd"] == saved
        else:
            assert isinstance(live, torch.Tensor)
            assert live.is_sparse or saved.is_sparse
            assert live.to_dense().tolist() == [1, 1, 1]


def test_the_error_of_weights_only_names_the_remedy(ckpt: Checkpointer, tmp_path: Path) -> None:
    live: dict[str, Any] = {"where": None, "x": torch.zeros(1)}
    ckpt.save(1, {"where": tmp_path, "x": torch.ones(1)})
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        ckpt.restore(live)
    assert live == {"where": None, "x": torch.zeros(1)}
    ckpt.restore(live, weights_only=False)
    assert live == {"where": tmp_path, "x": torch.ones(1)}


def test_a_file_of_torch_save_is_restored_by_its_path(ckpt: Checkpointer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    torch.save({"x": torch.ones(2), "n": 3}, tmp_path / "other" / "peer.pt")
    live: dict[str, Any] = {"x": torch.zeros(2), "n": 0}
    found = ckpt.restore(live, tmp_path / "other" / "peer.pt")
    assert found is not None
    assert (found.step, found.path) == (None, str(tmp_path / "other" / "peer.pt"))
    assert live["n"] == 3
    assert live["x"].tolist() == [1, 1]
    assert ckpt.latest() is None
