"""The state of a GPT-2 with Adam, and the tensors of any state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from asyncckpt._snapshot.freeze import Freezer


class Size(NamedTuple):
    """The numbers that the shapes of a GPT-2 follow from."""

    layers: int
    width: int
    vocabulary: int
    context: int


GPT2 = Size(layers=12, width=768, vocabulary=50257, context=1024)
QUICK = Size(layers=2, width=256, vocabulary=8192, context=256)

TIED = "lm_head.weight", "transformer.wte.weight"


class Training(NamedTuple):
    """What a training loop holds: a model, and an optimizer that has taken steps."""

    model: nn.Module
    optimizer: torch.optim.Adam

    def state(self) -> dict[str, Any]:
        """Return what is saved: a dict of state dicts."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": 1000}


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each parameter of a GPT-2, without the tied one."""
    w = size.width
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (size.vocabulary, w),
        "transformer.wpe.weight": (size.context, w),
    }
    block: dict[str, tuple[int, ...]] = {
        "ln_1.weight": (w,),
        "ln_1.bias": (w,),
        "attn.c_attn.weight": (w, 3 * w),
        "attn.c_attn.bias": (3 * w,),
        "attn.c_proj.weight": (w, w),
        "attn.c_proj.bias": (w,),
        "ln_2.weight": (w,),
        "ln_2.bias": (w,),
        "mlp.c_fc.weight": (w, 4 * w),
        "mlp.c_fc.bias": (4 * w,),
        "mlp.c_proj.weight": (4 * w, w),
        "mlp.c_proj.bias": (w,),
    }
    for layer in range(size.layers):
        found |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    return found | {"transformer.ln_f.weight": (w,), "transformer.ln_f.bias": (w,)}


class RandomTensors:
    """Makes tensors of random values out of a pool of them, since to draw 1.5 GB takes seconds."""

    def __init__(self) -> None:
        self._pool = torch.rand(5 << 20)
        self._made = 0

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor that begins where no other one does."""
        self._made += 1
        tensor = torch.empty(shape)
        for piece in tensor.view(-1).split(4 << 20):
            piece.copy_(self._pool[self._made : self._made + len(piece)])
        return tensor


def training(size: Size) -> Training:
    """Make a GPT-2 and its Adam, all of random values, as they are after a thousand steps."""
    random = RandomTensors()
    model = nn.Module()
    for name, shape in shapes(size).items():
        _put(model, name, nn.Parameter(random(shape)))
    tied, source = TIED
    _put(model, tied, model.get_parameter(source))
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-4)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1000.0),
            "exp_avg": random(tuple(parameter.shape)),
            "exp_avg_sq": random(tuple(parameter.shape)),
        }
    return Training(model, optimizer)


def gpt2(size: Size) -> dict[str, Any]:
    """Make the state of a GPT-2 and its Adam alone, without either: to import optimizers takes seconds."""
    random = RandomTensors()
    model = {name: random(shape) for name, shape in shapes(size).items()}
    tied, source = TIED
    return {
        "model": model | {tied: model[source]},
        "optimizer": adam_state(list(model.values()), random),
        "step": 1000,
    }


def adam_state(parameters: list[torch.Tensor], random: RandomTensors) -> dict[str, Any]:
    """Make the state dict of an Adam that has taken a thousand steps."""
    moments = {
        index: {
            "step": torch.tensor(1000.0),
            "exp_avg": random(tuple(parameter.shape)),
            "exp_avg_sq": random(tuple(parameter.shape)),
        }
        for index, parameter in enumerate(parameters)
    }
    groups = [{"lr": 6e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": list(moments)}]
    return {"state": moments, "param_groups": groups}


def distinct_tensors(state: Any) -> list[torch.Tensor]:
    """Return a flat tensor over all of each storage of a state, whatever in it holds that."""
    frozen, ranges = Freezer().freeze(state)
    dtypes = {key: dtype for key, dtype, *_ in frozen.tensors}
    return [
        torch.empty(0, dtype=dtypes.get(key, torch.uint8), device=source.device).set_(source)
        for key, source in enumerate(ranges.sources)
    ]


def bytes_of(state: Any) -> int:
    """Return the bytes of all storages of a state, each counted once."""
    return sum(Freezer().freeze(state)[0].sizes)


def device() -> torch.device:
    """Return where a training would have its state."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(state: Any, device: torch.device) -> Any:
    """Return a state of dicts, lists and whole tensors, as those above are, with its tensors on `device`."""
    moved: dict[int, torch.Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage().data_ptr()
            if storage not in moved:
                moved[storage] = value.to(device)
            return moved[storage]
        if isinstance(value, dict):
            return type(value)((key, move(item)) for key, item in value.items())
        return [move(item) for item in value] if isinstance(value, list) else value

    return state if device.type == "cpu" else move(state)


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:  # hasattr would also find methods
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)
