"""A restore that fails in the middle puts back everything that it had changed."""

from __future__ import annotations

import re
import signal
import threading
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asyncckpt import AsyncCkptError, Checkpointer, PartialRestoreError, StateMismatchError
from asyncckpt._loading.restore import DeferredSignals, restore
from asyncckpt._stateful import collect
from interrupts import interrupt_everywhere
from restoring import Counter, meaning, trained
from sameness import assert_same
from support import torch_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Int8(torch.Tensor):
    """A quantized weight, of which there is no copy into a float tensor."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls: type[Int8], codes: torch.Tensor, scale: torch.Tensor) -> Int8:  # noqa: PYI034 - as torch's own are
        made: Int8 = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, torch.Tensor], _constants: None, *_: Any) -> Int8:
        return cls(tensors["codes"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].codes, args[0].scale)
        if func is torch.ops.aten.clone.default:
            return Int8(args[0].codes.clone(), args[0].scale.clone())
        if func is torch.ops.aten.copy_.default and all(isinstance(value, Int8) for value in args[:2]):
            args[0].codes.copy_(args[1].codes)
            args[0].scale = args[1].scale.clone()
            if args[0].scale == 13:
                raise RuntimeError("a scale of 13")
            return args[0]
        raise NotImplementedError(f"{func} is not implemented for Int8")


def int8(code: int, scale: float = 0.5) -> Int8:
    return Int8(torch.full((2, 2), code, dtype=torch.int8), torch.tensor(scale))


class Interrupting(TorchDispatchMode):
    """Calls a function at the n-th copy into a tensor; counts the copies of tensors that are made."""

    def __init__(self, at: int, call: Callable[[], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.call, self.clones = at, call, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.clones += func is torch.ops.aten.clone.default
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
            if self.left == 0:
                self.call()
        return result


def whole(value: float, odd: object) -> dict[str, Any]:
    """Return a state with an entry of each kind around an odd one."""
    state = trained(steps=int(value), seed=int(value))
    return {
        **state,
        "x": torch.full((3,), value),
        "values": {"history": [value] * int(value), "n": value, "pair": (torch.full((2,), value), value)},
        "counter": Counter(int(value)),
        "hooked": nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))),
        "bits": torch.full((2,), value).to(torch.float8_e5m2),
        "odd": odd,
        "last": Counter(int(value)),
    }


def saved_from(state: object) -> Any:
    return torch_round_trip(collect(state))


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that lazy modules are new
        return nn.LazyLinear(2)


class Refusing(nn.Linear):
    """A module whose loading fails once it has loaded."""

    failure: BaseException = RuntimeError("not this one")

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        super().load_state_dict(*args, **options)
        self.extra = nn.Linear(1, 1)
        self.weight = nn.Parameter(torch.ones(5))
        if args[0]["bias"][0] == 7:
            raise self.failure


def refused() -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(2, 2), "bias": torch.full((2,), 7.0)}


@pytest.mark.parametrize(
    ("odd", "saved", "why"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, "not implemented for Int8"),
        (int8(1), int8(2, 13), "a scale of 13"),
        (Refusing(2, 2), refused(), "not this one"),
        (Counter(0, refuses=3), {"count": 3}, "not today"),
    ],
    ids=["int8 into float", "int8 into int8", "module", "object"],
)
def test_everything_is_put_back(odd: Any, saved: Any, why: str) -> None:
    live, content = whole(1, odd), saved_from(whole(2, saved))
    if saved is None:
        content["odd"] = saved_from(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        content["odd"]["1.weight"] = int8(3)
    before = meaning(live)
    objects = [*live["model"].parameters(), live["values"], live["values"]["history"], live["values"]["pair"]]
    groups = live["opt"].param_groups
    with pytest.raises(StateMismatchError, match=f"(?s)file.pt .*nothing was changed:.*odd.*({why})"):
        restore(live, content, "file.pt")
    assert_same(meaning(live), before)
    after = [*live["model"].parameters(), live["values"], live["values"]["history"], live["values"]["pair"]]
    assert all(one is other for one, other in zip(after, objects, strict=True))
    assert live["opt"].param_groups is groups
    assert groups[0]["params"][0] is live["model"][0].weight
    # What was put back still trains.
    live["model"](torch.randn(5, 3)).sum().backward()
    live["opt"].step()


def test_a_module_gets_its_own_parameters_back() -> None:
    module = Refusing(2, 2)
    weight, address, names = module.weight, module.weight.data_ptr(), list(module._modules)
    with pytest.raises(StateMismatchError, match="not this one"):
        restore({"odd": module}, {"odd": refused()}, "file.pt")
    assert module.weight is weight
    assert module.weight.data_ptr() == address
    assert list(module._modules) == names


class Elsewhere(nn.Linear):
    """A module that counts outside of its attributes, and takes the tensors that it is given as its own."""

    counts: ClassVar[dict[str, int]] = {}

    def get_extra_state(self) -> int:
        return self.counts.get("n", 0)

    def set_extra_state(self, state: int) -> None:
        self.counts["n"] = state

    def load_state_dict(self, state_dict: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict, assign=True, **options)


def test_extra_state_is_put_back_and_assigned_parameters_are_replaced_by_the_old_ones() -> None:
    live: Any = {"module": Elsewhere(2, 2), "odd": Counter(1, refuses=2)}
    before, weight = meaning(live["module"]), live["module"].weight
    content = {"module": {**meaning(Elsewhere(2, 2)), "_extra_state": 5}, "odd": {"count": 2}}
    with pytest.raises(StateMismatchError, match="not today"):
        restore(live, content, "file.pt")
    assert_same(meaning(live["module"]), before)
    assert live["module"].weight is weight


class Moving(nn.Linear):
    """A module that loads into other memory."""

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        self.weight.data = torch.empty(3, 5)
        self.bias.data = torch.empty(2)
        raise RuntimeError("not this one")


def test_parameters_get_their_memory_back() -> None:
    module = Moving(2, 2)
    before, addresses = meaning(module), [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(StateMismatchError, match="not this one"):
        restore({"odd": module}, {"odd": refused()}, "file.pt")
    assert_same(meaning(module), before)
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses


def test_keyboard_interrupt_in_a_load_is_raised_and_everything_is_put_back() -> None:
    odd = Refusing(2, 2)
    odd.failure = KeyboardInterrupt()
    live = whole(1, odd)
    before = meaning(live)
    with pytest.raises(KeyboardInterrupt):
        restore(live, saved_from(whole(2, refused())), "file.pt")
    assert_same(meaning(live), before)


class Signalling(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        signal.raise_signal(signal.SIGINT)
        self.count = -1


def test_a_signal_in_a_load_interrupts_it_and_everything_is_put_back() -> None:
    live: dict[str, Any] = {"first": Counter(1), "odd": Signalling(1), "x": torch.zeros(1)}
    with pytest.raises(KeyboardInterrupt):
        restore(live, {"first": {"count": 2}, "odd": {"count": 2}, "x": torch.ones(1)}, "file.pt")
    assert live["first"].count == 1
    assert live["x"].item() == 0


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_signal_during_the_final_copies_is_handled_after_them(at: int) -> None:
    live = {"model": nn.Linear(2, 2), "x": torch.zeros(2)}
    content = saved_from({"model": nn.Linear(2, 2), "x": torch.ones(2)})
    with (
        pytest.raises(KeyboardInterrupt),
        Interrupting(at, lambda: signal.raise_signal(signal.SIGINT)),
    ):
        restore(live, content, "file.pt")
    assert_same(meaning(live), content)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_deferred_signals_are_delivered_once_and_handlers_are_reinstated() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        with DeferredSignals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            assert len(heard) == 1
            signals.defer()
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert len(heard) == 1
        assert len(heard) == 2
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_after_a_handler_that_raised_are_deferred_to_the_end() -> None:
    heard: list[int] = []

    def interrupted() -> None:
        with DeferredSignals():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGUSR1)
                assert heard == []

    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_is_set_while_signals_are_deferred_stays() -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with DeferredSignals():
            signal.signal(signal.SIGUSR1, handler)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_restore_works_on_other_threads() -> None:
    live = {"x": torch.zeros(1)}
    thread = threading.Thread(target=restore, args=(live, {"x": torch.ones(1)}, "file.pt"))
    thread.start()
    thread.join()
    assert live["x"].item() == 1


class Slotted:
    """An object whose only way back is its own loading."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.count == 2:
            raise RuntimeError("only once")
        self.count = state["count"]


def test_partial_restore_error_lists_the_entries_that_were_not_put_back() -> None:
    live: dict[str, Any] = {"first": Counter(1), "stuck": Slotted(1), "odd": Counter(1, refuses=2)}
    content = {"first": {"count": 2}, "stuck": {"count": 2}, "odd": {"count": 2}}
    with pytest.raises(PartialRestoreError) as told:
        restore(live, content, "file.pt")
    assert str(told.value).split("\n") == [
        "restoring file.pt failed, and these entries could not be put back:",
        '  state["stuck"]: RuntimeError: only once',
    ]
    assert isinstance(told.value.__cause__, StateMismatchError)
    assert isinstance(told.value, (AsyncCkptError, RuntimeError))
    assert [live[key].count for key in live] == [1, 2, 1]


def test_entries_that_were_not_put_back_are_noted_at_a_keyboard_interrupt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    live: dict[str, Any] = {"stuck": Slotted(1), "odd": Signalling(1)}
    with pytest.raises(KeyboardInterrupt):
        restore(live, {"stuck": {"count": 2}, "odd": {"count": 2}}, "file.pt")
    assert 'state["stuck"]: RuntimeError: only once' in caplog.text


def test_a_failing_final_copy_lists_the_changed_tensors() -> None:
    def fail() -> None:
        raise RuntimeError("device lost")

    live: dict[str, Any] = {
        "x": torch.zeros(1),
        "y": torch.zeros(1),
        "z": torch.zeros(1),
        "counter": Counter(1),
    }
    content = {"x": torch.ones(1), "y": torch.ones(1), "z": torch.ones(1), "counter": {"count": 2}}
    with pytest.raises(PartialRestoreError) as told, Interrupting(2, fail):
        restore(live, content, "file.pt")
    assert [line.split(":")[0].strip() for line in str(told.value).split("\n")[1:]] == [
        'state["x"]',
        'state["y"]',
    ]
    assert [live[key].item() for key in "xyz"] == [1, 1, 0]
    assert live["counter"].count == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where generators end
def test_an_interrupt_leaves_gradients_enabled() -> None:
    model, content = nn.Linear(2, 2), saved_from(nn.Linear(2, 2))
    model.register_load_state_dict_post_hook(lambda *_: None)

    def check(where: str) -> None:
        assert torch.is_grad_enabled(), where

    assert interrupt_everywhere(lambda: restore(model, content, "file.pt"), lambda: None, check) > 200


def test_swapped_parameters_are_put_back() -> None:
    live: dict[str, Any] = {"model": nn.Linear(2, 2), "odd": Counter(1, refuses=2)}
    before, weight = meaning(live), live["model"].weight
    content = saved_from({"model": nn.Linear(2, 2), "odd": Counter(2)})
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(StateMismatchError, match="not today"):
            restore(live, content, "file.pt")
        assert_same(meaning(live), before)
        assert live["model"].weight is weight
        live["odd"].refuses = None
        restore(live, content, "file.pt")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(meaning(live), content)


def test_uninitialized_parameters_are_loaded_and_put_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = nn.Linear(3, 2)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"model": saved, "counter": Counter(2)})
        live: dict[str, Any] = {"model": lazy(), "counter": Counter(1, refuses=2)}
        with pytest.raises(StateMismatchError, match="not today"):
            ckpt.restore(live)
        assert live["model"].has_uninitialized_params()
        live = {"model": lazy(), "counter": Counter(1)}
        weight = live["model"].weight
        ckpt.restore(live)
    assert live["model"].weight is weight
    assert_same(meaning(live["model"]), meaning(saved))
    inputs = torch.ones(1, 3)
    assert torch.equal(live["model"](inputs), saved(inputs))


@pytest.mark.parametrize("live", [nn.Linear(2, 2, device="meta"), torch.zeros(2, device="meta")])
def test_values_for_meta_tensors_are_refused_with_the_remedy(live: Any) -> None:
    content = saved_from(nn.Linear(2, 2) if isinstance(live, nn.Module) else torch.ones(2))
    counter = Counter(1)
    with pytest.raises(StateMismatchError, match=r'state\["x"\].*meta tensor.*to_empty.*assign=True'):
        restore({"counter": counter, "x": live}, {"counter": {"count": 2}, "x": content}, "file.pt")
    assert counter.count == 1


def test_values_that_a_hooked_module_drops_because_of_meta_tensors_are_refused() -> None:
    live = nn.Linear(2, 2, device="meta")
    live.register_load_state_dict_post_hook(lambda *_: None)
    with (
        pytest.warns(UserWarning, match="no-op"),
        pytest.raises(StateMismatchError, match=r"meta device took no values: weight, bias; materialize"),
    ):
        restore({"x": live}, {"x": saved_from(nn.Linear(2, 2))}, "file.pt")


class Assigning(nn.Linear):
    def load_state_dict(self, state_dict: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict, assign=True, **options)


def test_a_module_that_materializes_itself_is_loaded() -> None:
    live, saved = Assigning(2, 2, device="meta"), nn.Linear(2, 2)
    restore({"x": live}, {"x": saved_from(saved)}, "file.pt")
    assert torch.equal(live.weight, saved.weight)


def test_a_module_that_renames_what_an_older_version_saved_is_loaded() -> None:
    def rename(state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "old" in state:
            state[prefix + "weight"] = state.pop(prefix + "old")

    saved = saved_from(nn.Linear(2, 2))
    saved["old"] = saved.pop("weight")
    live = nn.Linear(2, 2)
    live.register_load_state_dict_pre_hook(lambda _, *args: rename(*args))
    restore({"x": live, "n": 0}, {"x": saved, "n": 1}, "file.pt")
    assert torch.equal(live.weight, saved["old"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was left out
        restore({"x": live, "n": 0}, {"x": saved, "n": 1}, "file.pt", strict=False)


def test_mismatches_of_hooked_modules_are_listed_beside_others() -> None:
    live = Refusing(2, 2)
    with pytest.raises(StateMismatchError) as told:
        restore({"x": live, "y": torch.zeros(1)}, {"x": {"weight": torch.ones(3)}, "y": 1}, "file.pt")
    assert str(told.value).split("\n  ")[1:] == [
        'state["y"]: a tensor is expected, the checkpoint has a int',
        'state["x"]["weight"]: shape (3,) in the checkpoint, (2, 2) in the state',
        'state["x"]["bias"]: missing in the checkpoint',
    ]


def test_a_stock_module_is_restored_without_a_copy_of_its_tensors() -> None:
    live, saved = {"model": trained(steps=1)["model"]}, {"model": trained(steps=2)["model"]}
    content = saved_from({**saved, "x": torch.ones(2, dtype=torch.float64)})
    with Interrupting(100, list) as seen:
        restore({**live, "x": torch.zeros(2)}, content, "file.pt")
    assert seen.clones == 0
    assert_same(meaning(live), meaning(saved))
    live["model"].register_load_state_dict_post_hook(lambda *_: None)
    with Interrupting(100, list) as seen:
        restore(live, {"model": content["model"]}, "file.pt")
    assert seen.clones > 0


class WritingInPlace(torch.optim.SGD):
    """An optimizer that writes into its tensors, and refuses a momentum of 7."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for parameter, entry in zip(self.state, state_dict["state"].values(), strict=True):
            self.state[parameter]["momentum_buffer"].copy_(entry["momentum_buffer"])
            self.param_groups[0]["lr"] = state_dict["param_groups"][0]["lr"]
            if entry["momentum_buffer"][0] == 7:
                raise RuntimeError("a momentum of 7")


@pytest.mark.parametrize("kind", [WritingInPlace, torch.optim.SGD])
def test_an_optimizer_gets_its_tensors_and_groups_back(kind: type[torch.optim.SGD]) -> None:
    def optimizer(momentum: float, lr: float) -> torch.optim.SGD:
        parameter = nn.Parameter(torch.zeros(2))
        made = kind([parameter], lr=lr, momentum=0.9)
        parameter.grad = torch.full((2,), momentum)
        made.step()
        return made

    live = optimizer(1.0, 0.1)
    if kind is torch.optim.SGD:
        live.register_load_state_dict_post_hook(
            lambda opt: opt.state.popitem()[1]["momentum_buffer"].neg_().item()
        )
    before, groups, lists = meaning(live), live.param_groups, live.param_groups[0]["params"]
    buffer = live.state[lists[0]]["momentum_buffer"]
    with pytest.raises(StateMismatchError, match=r"momentum of 7|Tensor"):
        restore({"opt": live}, saved_from({"opt": optimizer(7.0, 0.5)}), "file.pt")
    assert_same(meaning(live), before)
    assert live.param_groups is groups
    assert live.state[lists[0]]["momentum_buffer"] is buffer


def test_new_attributes_of_a_scheduler_are_removed_again() -> None:
    live = trained(steps=1)["sched"]
    before = meaning(live)
    with pytest.raises(StateMismatchError, match="not today"):
        restore(
            {"sched": live, "odd": Counter(1, refuses=2)},
            {"sched": {**live.state_dict(), "new": 1, "last_epoch": 9}, "odd": {"count": 2}},
            "file.pt",
        )
    assert_same(meaning(live), before)


class Refuser(dict[str, Any]):
    """A dict that takes no negative numbers."""

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, int) and value < 0:
            raise ValueError("negative")
        super().__setitem__(key, value)


def test_a_container_that_refuses_a_value_is_named_and_all_is_put_back() -> None:
    live = {"list": [1], "n": 1, "odd": Refuser(x=torch.zeros(1), n=1)}
    content = {"list": [1, 2], "n": 2, "odd": {"x": torch.ones(1), "n": -1}}
    with pytest.raises(StateMismatchError, match=re.escape('state["odd"]["n"]: ValueError: negative')):
        restore(live, content, "file.pt")
    assert live == {"list": [1], "n": 1, "odd": {"x": torch.zeros(1), "n": 1}}


def test_a_state_that_cannot_be_copied_is_not_changed() -> None:
    class Locked(Counter):
        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "lock": threading.Lock()}

    live = {"first": Counter(1), "odd": Locked(1)}
    with pytest.raises(StateMismatchError, match=r'state\["odd"\]: TypeError: cannot pickle'):
        restore(live, {"first": {"count": 2}, "odd": {"count": 2}}, "file.pt")
    assert [live[key].count for key in live] == [1, 1]
