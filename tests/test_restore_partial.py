"""A part of a checkpoint, or a part of a state, is restored where that is asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from asyncckpt import Checkpointer, StateMismatchError
from asyncckpt._loading.restore import restore
from asyncckpt._loading.state_keys import map_state_keys, prefix_remedy
from restoring import Counter, meaning, trained
from sameness import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def ckpt(tmp_path: Path) -> Iterator[Checkpointer]:
    with Checkpointer(tmp_path) as ckpt:
        yield ckpt


NAMES = ', where names = {key.replace("_orig_mod.", ""): key for key in module.state_dict()}'
HINT = "strict=False restores the entries that both have"


def test_strict_restore_of_differing_keys_is_an_error_that_names_strict(ckpt: Checkpointer) -> None:
    saved, live = trained(2), {"model": trained(0, seed=1)["model"], "new": 1}
    ckpt.save(1, saved)
    before = meaning(live)
    with pytest.raises(StateMismatchError) as told:
        ckpt.restore(live)
    assert str(told.value).split("\n")[1:] == [
        '  state["new"]: missing in the checkpoint',
        '  state["opt"]: unexpected, the state has no such entry',
        '  state["sched"]: unexpected, the state has no such entry',
        '  state["step"]: unexpected, the state has no such entry',
        HINT,
    ]
    assert_same(meaning(live), before)


def test_common_entries_are_restored_and_one_warning_lists_the_others(ckpt: Checkpointer) -> None:
    saved, live = trained(2), {"model": trained(0, seed=1)["model"], "new": 1, "step": 0}
    ckpt.save(1, saved)
    with pytest.warns(UserWarning, match="restored in part") as told:
        found = ckpt.restore(live, strict=False)
    assert found == ckpt.latest()
    assert_same(meaning(live["model"]), meaning(saved["model"]))
    assert (live["new"], live["step"]) == (1, 2)
    assert [(warning.filename, str(warning.message)) for warning in told] == [
        (
            __file__,
            "\n  ".join(
                [
                    f"{found.path if found else None} is restored in part:",
                    'not in the checkpoint, left as they are: state["new"]',
                    'not in the state, not taken: state["opt"], state["sched"]',
                ]
            ),
        )
    ]


def test_no_warning_if_all_entries_match(ckpt: Checkpointer) -> None:
    saved, live = trained(2), trained(0, seed=1)
    ckpt.save(1, saved)
    ckpt.restore(live, strict=False)
    assert_same(meaning(live), meaning(saved))


@pytest.mark.parametrize("hooked", [False, True])
def test_common_entries_of_a_module_are_restored(hooked: bool) -> None:  # noqa: FBT001 - parametrized
    live: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    if hooked:
        live.register_load_state_dict_post_hook(lambda *_: None)
    saved = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 3)).state_dict()
    kept = live[1].weight.clone()
    with pytest.warns(UserWarning, match="restored in part") as told:
        restore({"model": live}, {"model": saved}, "file.pt", strict=False)
    assert str(told[0].message).split("\n")[1:] == [
        '  not in the checkpoint, left as they are: state["model"]["1.weight"]',
        '  not in the state, not taken: state["model"]["2.weight"], state["model"]["2.bias"]',
    ]
    assert torch.equal(live[0].weight, saved["0.weight"])
    assert torch.equal(live[1].weight, kept)
    with pytest.raises(
        StateMismatchError, match=f'(?s)"1.weight".*"2.bias".*\n{HINT}' if not hooked else HINT
    ):
        restore({"model": live}, {"model": saved}, "file.pt")


def test_common_entries_of_nested_dicts_are_restored() -> None:
    live = {"deep": {"x": torch.zeros(1), "kept": 1, "list": [{"y": torch.zeros(1), "z": 2}]}}
    content = {"deep": {"x": torch.ones(1), "list": [{"y": torch.ones(1), "w": 3}]}}
    with pytest.warns(UserWarning, match="restored in part") as told:
        restore(live, content, "file.pt", strict=False)
    assert live == {"deep": {"x": torch.ones(1), "kept": 1, "list": [{"y": torch.ones(1), "z": 2}]}}
    assert str(told[0].message).split("\n")[1:] == [
        '  not in the checkpoint, left as they are: state["deep"]["kept"], state["deep"]["list"][0]["z"]',
        '  not in the state, not taken: state["deep"]["list"][0]["w"]',
    ]


def test_shapes_must_match_without_strict() -> None:
    live = {"x": torch.zeros(2), "y": 1}
    with pytest.raises(StateMismatchError) as told:
        restore(live, {"x": torch.zeros(3), "z": 1}, "file.pt", strict=False)
    assert str(told.value).split("\n")[1:] == [
        '  state["x"]: shape (3,) in the checkpoint, (2,) in the state'
    ]


def test_the_warning_lists_ten_of_each_kind() -> None:
    live = {"x": 0, **{f"live{n}": n for n in range(12)}}
    content = {"x": 1, **{f"saved{n}": n for n in range(30)}}
    with pytest.warns(UserWarning, match="restored in part") as told:
        restore(live, content, "file.pt", strict=False)
    _, missing, unexpected = str(told[0].message).split("\n")
    assert missing.endswith('state["live9"] and 2 more')
    assert unexpected.endswith('state["saved9"] and 20 more')
    assert unexpected.count("state[") == 10


@pytest.mark.parametrize(
    ("live", "saved"),
    [
        ({"a": 1}, {"b": 2}),
        ({"model": nn.Linear(2, 2)}, {"net": {}}),
        ({}, {"b": 2}),
        ({"model": nn.Linear(2, 2)}, {"model": {"w": torch.zeros(1)}}),
        (
            {"model": nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))},
            {"model": {"w": torch.zeros(1)}},
        ),
        ({"deep": {"x": torch.zeros(1)}}, {"deep": {"y": torch.zeros(1)}}),
    ],
)
def test_no_common_entry_is_an_error_without_strict(live: Any, saved: Any) -> None:
    before = meaning(live)
    for strict in (True, False):
        with pytest.raises(StateMismatchError, match=r"file.pt does not fit") as told:
            restore(live, saved, "file.pt", strict=strict)
        assert HINT not in str(told.value)
        assert_same(meaning(live), before)


def test_a_warning_turned_into_an_error_leaves_the_state_unchanged(ckpt: Checkpointer) -> None:
    live = {"counter": Counter(1), "model": nn.Linear(1, 1), "n": 1}
    before = meaning(live)
    ckpt.save(1, {"counter": Counter(2), "model": nn.Linear(1, 1), "n": 2, "more": 3})
    with pytest.raises(UserWarning, match="restored in part"):  # as pytest is configured
        ckpt.restore(live, strict=False)
    assert_same(meaning(live), before)


class Strict(nn.Linear):
    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict)


def test_the_error_names_a_module_whose_load_takes_no_strict() -> None:
    live = {"n": 0, "odd": Strict(2, 2)}
    with pytest.raises(StateMismatchError, match=r'state\["odd"\]: TypeError: .*strict'):
        restore(live, {"n": 1, "odd": {"bias": torch.zeros(2)}}, "file.pt", strict=False)
    assert live["n"] == 0


class Wrapped(nn.Module):
    """A module inside another, under the name that a wrapper gives it."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def nested(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.ModuleDict({"encoder": wrap(nn.Linear(2, 2)), "submodule": wrap(nn.Linear(2, 1))})


def plain(module: nn.Module) -> nn.Module:
    return module


def compiled(module: nn.Module) -> nn.Module:
    return Wrapped("_orig_mod", module)


def parallel(module: nn.Module) -> nn.Module:
    return Wrapped("module", module)


@pytest.mark.parametrize(
    ("live", "saved", "code"),
    [
        (nested(plain), compiled(nested(plain)), 'lambda key: key.replace("_orig_mod.", "")'),
        (nested(plain), nested(compiled), 'lambda key: key.replace("_orig_mod.", "")'),
        (nn.Linear(2, 2), parallel(nn.Linear(2, 2)), 'lambda key: key.replace("module.", "")'),
        (nested(plain), parallel(nested(plain)), 'lambda key: key.removeprefix("module.")'),
        (
            nn.Linear(2, 2),
            parallel(compiled(nn.Linear(2, 2))),
            'lambda key: key.replace("_orig_mod.", "").replace("module.", "")',
        ),
        (compiled(nested(plain)), nested(plain), 'lambda key: "_orig_mod." + key'),
        (parallel(nested(plain)), nested(plain), 'lambda key: "module." + key'),
        (
            compiled(nn.Linear(2, 2)),
            parallel(nn.Linear(2, 2)),
            'lambda key: "_orig_mod." + key.replace("module.", "")',
        ),
        (
            nested(compiled),
            nested(plain),
            f"lambda key: names.get(key, key){NAMES}",
        ),
    ],
)
def test_wrapper_prefixes_are_reported_with_a_map_keys_that_works(
    ckpt: Checkpointer, live: nn.Module, saved: nn.Module, code: str
) -> None:
    ckpt.save(1, {"net": saved, "n": 1})
    state = {"net": live, "n": 0}
    keys = len(live.state_dict())
    hint = f'state["net"]: {keys} of {keys} keys match with map_keys={code}'
    with pytest.raises(StateMismatchError, match=re.escape(hint)):
        ckpt.restore(state)
    with pytest.warns(UserWarning, match=re.escape(hint)):
        ckpt.restore(state, strict=False)
    function, _, names = code.partition(", where names = ")
    scope: dict[str, Any] = {"module": live}
    scope["names"] = eval(names, scope) if names else None
    ckpt.restore(state, map_keys=eval(function, scope))
    for one, other in zip(live.parameters(), saved.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_prefix_of_torch_compile_is_reported(ckpt: Checkpointer) -> None:
    live = nn.Linear(2, 2)
    saved: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    ckpt.save(1, {"net": saved})
    with pytest.raises(StateMismatchError, match=re.escape('key.replace("_orig_mod.", "")')):
        ckpt.restore({"net": live})
    ckpt.restore({"net": live}, map_keys=lambda key: key.replace("_orig_mod.", ""))
    assert torch.equal(live.weight, saved.weight)


def test_map_keys_applies_to_dicts_of_tensors_only() -> None:
    live = {"a.weights": {"w": torch.zeros(1)}, "a.n": 0, "a.mixed": {"a.x": torch.zeros(1), "n": 0}}
    content = {
        "a.weights": {"a.w": torch.ones(1)},
        "a.n": 1,
        "a.mixed": {"a.x": torch.ones(1), "n": 1},
    }
    restore(live, content, "file.pt", map_keys=lambda key: key.removeprefix("a."))
    assert live == {"a.weights": {"w": torch.ones(1)}, "a.n": 1, "a.mixed": {"a.x": torch.ones(1), "n": 1}}


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda _: "w", "map_keys makes 'w' of both 'weight' and 'bias'"),
        (lambda _: None, "map_keys must return a str, but returned None for 'weight'"),
    ],
)
def test_map_keys_must_return_distinct_strings(function: Any, told: str) -> None:
    live = nn.Linear(1, 1)
    with pytest.raises(StateMismatchError, match=re.escape(f'state["net"]: {told}')):
        restore({"net": live}, {"net": nn.Linear(1, 1).state_dict()}, "file.pt", map_keys=function)


def test_map_keys_must_be_callable(ckpt: Checkpointer) -> None:
    ckpt.save(1, {"n": 1})
    with pytest.raises(TypeError, match=r"map_keys must be a function of a key, not {'a': 'b'}"):
        ckpt.restore({"n": 1}, map_keys={"a": "b"})  # type: ignore[arg-type]


class Versioned(nn.Linear):
    """A module whose older versions had half the weight."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version") != 2:
            state[prefix + "weight"] = state[prefix + "weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize(
    ("wrap", "unwrap", "back"),
    [(compiled, plain, "_orig_mod."), (plain, compiled, "")],
)
def test_map_keys_maps_module_versions(
    wrap: Callable[[nn.Module], nn.Module], unwrap: Callable[[nn.Module], nn.Module], back: str
) -> None:
    saved, live = nn.Sequential(wrap(Versioned(1, 1))), nn.Sequential(unwrap(Versioned(1, 1)))

    def renamed(key: str) -> str:
        return key.replace(back, "") if back else key.replace("0.", "0._orig_mod.")

    restore({"net": live}, {"net": saved.state_dict()}, "file.pt", map_keys=renamed)
    for one, other in zip(live.parameters(), saved.parameters(), strict=True):
        assert torch.equal(one, other)


def test_map_keys_leaves_keys_that_are_no_strings() -> None:
    mapped, problems = map_state_keys({1: 2, "a": 3}, str.upper)
    assert (dict(mapped), problems) == ({1: 2, "A": 3}, [])


@pytest.mark.parametrize(
    ("own", "saved"),
    [
        (["a", "b"], ["c", "d"]),
        (["a"], ["a", "module.b"]),
        (["a"], ["a", "module.a"]),
        ([], ["a"]),
        ([1], [2]),
    ],
)
def test_no_remedy_where_prefixes_do_not_explain_the_difference(own: list[Any], saved: list[Any]) -> None:
    assert prefix_remedy(own, saved) is None
