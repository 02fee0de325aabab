"""Kinds of state that hypothesis does not make: each must come back as from torch.save."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

import asyncckpt
from asyncckpt import Checkpointer
from sameness import assert_same
from states import Model
from support import torch_round_trip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Doubled(torch.Tensor):
    """A wrapper subclass: what it shows is twice what it holds."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls: type[Doubled], inner: torch.Tensor) -> Doubled:  # noqa: PYI034 - as torch's own are
        made: Doubled = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.held = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["held"], "twice"

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, torch.Tensor], _constants: str, *_: Any) -> Doubled:
        return cls(tensors["held"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def unwrapped(value: Any) -> Any:
            return value.held * 2 if isinstance(value, Doubled) else value

        if func is torch.ops.aten.detach.default:
            return Doubled(args[0].held.detach())
        return func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))


class ReducedDoubled(Doubled):
    """The same with a reduction of its own."""

    def __reduce_ex__(self, protocol: Any) -> tuple[type[ReducedDoubled], tuple[torch.Tensor]]:
        return ReducedDoubled, (self.held,)


def quantized() -> list[torch.Tensor]:
    values = torch.arange(8.0)
    scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
    tensor = torch.quantize_per_tensor(values, 0.1, 3, torch.quint8)
    return [tensor, tensor[2:], torch.quantize_per_channel(values.view(2, 4), scales, zeros, 0, torch.qint8)]


def sparse() -> list[torch.Tensor]:
    dense = torch.eye(4) * 3
    indices, values = torch.tensor([[1, 1], [0, 0]]), torch.tensor([1.0, 2.0])
    repeated = torch.sparse_coo_tensor(indices, values, (3, 3), check_invariants=True)
    blocks = [dense.to_sparse_bsr((2, 2)), dense.to_sparse_bsc((2, 2))]
    return [dense.to_sparse(), repeated, dense.to_sparse_csr(), dense.to_sparse_csc(), *blocks]


def meta() -> dict[str, Any]:
    tensor = torch.empty(4, 3, device="meta", dtype=torch.bfloat16)
    return {
        "tensor": tensor,
        "view": tensor.t(),
        "parameter": torch.nn.Parameter(tensor),
        "real": torch.ones(2),
    }


def wrapped() -> dict[str, Any]:
    inner = torch.arange(4.0)
    both = Doubled(inner), ReducedDoubled(inner)
    return {
        "inner": inner,
        "both": both,
        "again": both[0],
        "parameter": torch.nn.Parameter(Doubled(torch.ones(2))),
    }


def nested() -> list[torch.Tensor]:
    parts = [torch.arange(3.0), torch.arange(5.0)]
    return [torch.nested.nested_tensor(parts)]


def trained() -> dict[str, Any]:
    """Return the state of a training run after a few steps, as its own state dicts."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(3):
        scaler.scale(model.head(model.norm(model.embed(torch.arange(5)))).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
    }


def random_states() -> dict[str, Any]:
    generator = np.random.default_rng(7)
    generator.random(3)
    return {
        "torch": torch.get_rng_state(),
        "generator": torch.Generator().manual_seed(5).get_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - what training scripts save
        "numpy_generator": generator.bit_generator.state,
        "python": random.getstate(),
    }


def modules() -> dict[str, Any]:
    model = Model()
    parts = torch.nn.ParameterList([model.embed.weight]), torch.nn.LSTM(2, 3)
    return {
        "whole": model,
        "dict": model.state_dict(),
        "parts": parts,
        "keep_vars": model.state_dict(keep_vars=True),
    }


def storages_within_objects() -> dict[str, Any]:
    base = torch.arange(8, dtype=torch.uint8)
    return {
        "view": base[2:],
        "raw": base.untyped_storage(),
        "same": [base.untyped_storage(), base.view(2, 4)],
    }


def references() -> dict[str, Any]:
    shared: list[Any] = [torch.ones(2)]
    shared.append(shared)
    keyed = {torch.float32: 1, (1, "a"): shared, frozenset({2}): torch.Size([1])}
    return {
        "one": shared,
        "two": shared,
        "keyed": keyed,
        "function": torch.nn.functional.relu,
        "class": OrderedDict,
    }


CASES: list[Callable[[], Any]] = [
    quantized, sparse, meta, wrapped, nested, trained, random_states, modules, storages_within_objects,
    references,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*quantized.*deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*per_tensor.*:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", CASES)
def test_comes_back_as_from_torch_save(make: Callable[[], Any], tmp_path: Path) -> None:
    state = make()
    expected = torch_round_trip(state)
    asyncckpt.save(state, tmp_path / "state.pt").committed.result()
    assert_same(torch.load(tmp_path / "state.pt", weights_only=False), expected)
    assert_same(asyncckpt.load(tmp_path / "state.pt", weights_only=False), expected)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - not in every torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor_on_a_mesh_of_one_rank(mesh: Any, tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: PLC0415 - not in every torch

    local = torch.arange(12.0).view(4, 3)
    state: dict[str, Any] = {"sharded": distribute_tensor(local, mesh, [Shard(0)]), "plain": torch.ones(2)}
    expected = torch_round_trip(state)
    save = asyncckpt.save(state, tmp_path / "state.pt")
    state["sharded"].to_local().zero_()
    save.committed.result()
    for found in (
        torch.load(tmp_path / "state.pt", weights_only=False),
        asyncckpt.load(tmp_path / "state.pt", weights_only=False),
    ):
        assert isinstance(found["sharded"], DTensor)
        assert found["sharded"].placements == expected["sharded"].placements
        assert_same(found["sharded"].to_local(), expected["sharded"].to_local())
        assert torch.equal(found["sharded"].to_local(), torch.arange(12.0).view(4, 3))


def test_random_states_are_those_of_the_moment(tmp_path: Path) -> None:
    generators: dict[str, Any] = {
        "python": random.Random(1),
        "numpy": np.random.default_rng(2),
        "torch": torch.get_rng_state(),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, generators)
        drawn = generators["python"].random(), generators["numpy"].random(), torch.rand(1)
        found = checkpointer.load(weights_only=False)
    torch.set_rng_state(found["torch"])
    assert (found["python"].random(), found["numpy"].random(), torch.rand(1)) == drawn


def test_a_large_state_is_that_of_the_moment_though_it_is_copied_while_it_is_written(tmp_path: Path) -> None:
    state = {
        "large": torch.full((48 << 18,), 1.0),
        "small": torch.zeros(3),
        "more": torch.full((4 << 18,), 2.0),
    }
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(3):
            save = checkpointer.save(step, state)
            assert save.snapshotted.done()
            for tensor in state.values():
                tensor.add_(1)
        for step in range(3):
            for name, first in (("large", 1.0), ("small", 0.0), ("more", 2.0)):
                assert checkpointer.load(step)[name].unique().tolist() == [first + step]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["a"].add_(1),
        lambda s: s.update(n=2),
        lambda s: s.update(n="text"),
        lambda s: s["a"].requires_grad_(),
        lambda s: s.update(a=s["a"].view(2, 3)),
        lambda s: s.update(a=s["a"][::2]),
        lambda s: s.update(a=s["b"], b=s["a"]),
        lambda s: s.update(b=s["a"]),
        lambda s: s.update(b=s["a"].view(6)),
        lambda s: s.update(c=torch.ones(1)),
        lambda s: s.pop("b"),
        lambda s: s.update(b=s["b"].int()),
        lambda s: s.update(b=torch.nn.Parameter(s["b"])),
        lambda s: s.update(b=s.pop("a"), a=s["b"]),
    ],
)
def test_whatever_changes_between_two_saves_is_in_the_second(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    state: dict[str, Any] = {"a": torch.arange(6.0), "b": torch.zeros(6), "n": 1}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, state)
        change(state)
        checkpointer.save(3, state)
        assert_same(checkpointer.load(3, weights_only=False), torch_round_trip(state))
        assert_same(checkpointer.load(2), {"a": torch.arange(6.0), "b": torch.zeros(6), "n": 1})


def test_objects_that_load_another_checkpoint_while_they_are_loaded(tmp_path: Path) -> None:
    asyncckpt.save({"base": torch.ones(3)}, tmp_path / "base.pt").committed.result()
    state: dict[str, Any] = {
        "before": torch.full((2,), 1.0),
        "adapter": Adapter(tmp_path / "base.pt"),
        "after": torch.full((4,), 7.0),
    }
    asyncckpt.save(state, tmp_path / "state.pt").committed.result()
    found = asyncckpt.load(tmp_path / "state.pt", weights_only=False)
    assert torch.equal(found["before"], state["before"])
    assert torch.equal(found["adapter"].base, torch.ones(3))
    assert torch.equal(found["after"], state["after"])


class Adapter:
    """Keeps the path of the weights it rests on, not the weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = asyncckpt.load(path)["base"]

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_tensors_come_back(tmp_path: Path) -> None:
    # Their size holds a number that is made anew in every process, so only what they hold is compared.
    parts = [torch.arange(3.0), torch.arange(5.0)]
    asyncckpt.save(torch.nested.nested_tensor(parts, layout=torch.jagged), tmp_path / "jagged.pt")
    asyncckpt.wait()
    loaded = asyncckpt.load(tmp_path / "jagged.pt", weights_only=False)
    assert loaded.layout is torch.jagged
    assert all(torch.equal(one, other) for one, other in zip(loaded.unbind(), parts, strict=True))
