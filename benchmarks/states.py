"""The states that are saved and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from asyncckpt._bench.states import (
    GPT2,
    QUICK,
    TIED,
    RandomTensors,
    Size,
    adam_state,
    bytes_of,
    device,
    distinct_tensors,
    gpt2,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "GPT2",
    "QUICK",
    "Training",
    "bytes_of",
    "device",
    "distinct_tensors",
    "lora",
    "many_tensors",
    "named",
    "resnet",
    "small",
    "spread",
    "tensors_of",
    "training",
]


class Training(NamedTuple):
    """What a training loop holds: a model, and an optimizer that has taken steps."""

    model: nn.Module
    optimizer: torch.optim.Adam

    def state(self) -> dict[str, Any]:
        """Return what is saved: a dict of state dicts."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": 1000}


def training(size: Size) -> Training:
    """Make a GPT-2 and its Adam, all of random values, as they are after a thousand steps."""
    state, model = gpt2(size), nn.Module()
    for name, tensor in state["model"].items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:  # hasattr would also find methods
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        tied, source = TIED
        parameter = model.get_parameter(source) if name == tied else nn.Parameter(tensor)
        module.register_parameter(leaf, parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-4)
    moments = state["optimizer"]["state"].values()
    optimizer.state.update(zip(model.parameters(), moments, strict=True))
    return Training(model, optimizer)


def many_tensors(count: int = 10_000) -> dict[str, Any]:
    """Make a state of `count` tensors of 1 KiB, with a step counter and ten parameter groups."""
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(first, count, 10))}
        for first in range(10)
    ]
    model = {f"layers.{index}.weight": torch.rand(256) for index in range(count)}
    return {"step": 0, "model": model, "optimizer": {"param_groups": groups}}


def small() -> dict[str, Any]:
    """Make a state of 1 MB in 16 tensors."""
    return {"step": 0, "model": {f"layers.{index}.weight": torch.rand(128, 128) for index in range(16)}}


def resnet(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, Any]:
    """Make the state of a ResNet with batch-norm, by default of 50 layers, and of its SGD.

    Args:
        width: channels of the first convolution.
        blocks: of three convolutions each, in each of the stages.
    """
    random, model = RandomTensors(), dict[str, torch.Tensor]()

    def convolution(name: str, into: int, out: int, side: int) -> None:
        model[f"{name}.conv.weight"] = random(out, into, side, side)
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            model[f"{name}.norm.{statistic}"] = random(out)
        model[f"{name}.norm.num_batches_tracked"] = torch.tensor(1000)

    convolution("stem", 3, width, 7)
    channels = width
    for stage, count in enumerate(blocks):
        inner = width << stage
        for block in range(count):
            name = f"stage{stage}.{block}"
            convolution(f"{name}.reduce", channels, inner, 1)
            convolution(f"{name}.middle", inner, inner, 3)
            convolution(f"{name}.expand", inner, 4 * inner, 1)
            if channels != 4 * inner:
                convolution(f"{name}.shortcut", channels, 4 * inner, 1)
            channels = 4 * inner
    model["head.weight"], model["head.bias"] = random(1000, channels), random(1000)
    trained = [tensor for name, tensor in model.items() if name.endswith(("weight", "bias"))]
    momentum = {i: {"momentum_buffer": random(*tensor.shape)} for i, tensor in enumerate(trained)}
    groups = [{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "params": list(momentum)}]
    optimizer = {"state": momentum, "param_groups": groups}
    return {"model": model, "optimizer": optimizer, "rng": torch.get_rng_state(), "epoch": 10, "step": 1000}


def lora(layers: int = 80, width: int = 512, rank: int = 16) -> dict[str, Any]:
    """Make the state of LoRA adapters on all projections of a transformer, and of their Adam.

    Args:
        layers: of the transformer, with seven projections each.
        width: of the transformer.
        rank: of the adapters.
    """
    random = RandomTensors()
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = {
        f"layers.{layer}.{projection}.lora_{side}.weight": random(*shape)
        for layer in range(layers)
        for projection in projections
        for side, shape in (("A", (rank, width)), ("B", (width, rank)))
    }
    optimizer = adam_state(model.values(), random)
    return {"model": model, "optimizer": optimizer, "step": 1000}


def spread(nbytes: int) -> dict[str, Any]:
    """Make a state of about `nbytes` in tensors of 4 MB and a rest."""
    whole, rest = divmod(nbytes // 4, 1 << 20)
    random = RandomTensors()
    lengths = [1 << 20] * whole + [rest] * (rest > 0)
    return {"step": 0, "model": {f"layers.{i}.weight": random(length) for i, length in enumerate(lengths)}}


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def named(name: str, *, quick: bool = False) -> Any:
    """Make the state that a name stands for, the same values each time, on the GPU if there is one.

    Args:
        name: "gpt2", "resnet" or "lora"; "bytes:N" or "tensors:N"; "file:PATH", which torch.load reads.
        quick: of the first three, a small one.
    """
    torch.manual_seed(0)
    kind, _, rest = name.partition(":")
    if kind == "file":
        return torch.load(rest, map_location=device(), weights_only=True)
    makers: dict[str, Callable[[], Any]] = {
        "bytes": lambda: spread(int(rest)),
        "tensors": lambda: many_tensors(int(rest)),
        "gpt2": lambda: gpt2(QUICK if quick else GPT2),
        "resnet": lambda: resnet(8, (1, 1)) if quick else resnet(),
        "lora": lambda: lora(2, 64) if quick else lora(),
    }
    with device():
        return makers[kind]()
