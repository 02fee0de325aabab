"""The state of a GPT-2 with Adam, and the storages of any state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from asyncckpt._snapshot.freeze import Freezer

if TYPE_CHECKING:
    from collections.abc import Iterable


class Size(NamedTuple):
    """The numbers that the shapes of a GPT-2 follow from."""

    layers: int
    width: int
    vocabulary: int
    context: int


GPT2 = Size(layers=12, width=768, vocabulary=50257, context=1024)
QUICK = Size(layers=2, width=256, vocabulary=8192, context=256)

# The layers of a block, and the shapes of their weights in widths.
_BLOCK = (
    ("ln_1", 1),
    ("attn.c_attn", 1, 3),
    ("attn.c_proj", 1, 1),
    ("ln_2", 1),
    ("mlp.c_fc", 1, 4),
    ("mlp.c_proj", 4, 1),
)
TIED = "lm_head.weight", "transformer.wte.weight"


class RandomTensors:
    """Makes tensors of random values out of a pool of them: drawing 1.5 GB takes seconds."""

    def __init__(self) -> None:
        self._pool = torch.rand(5 << 20)
        self._made = 0

    def __call__(self, *shape: int) -> torch.Tensor:
        """Return a tensor that begins where no other one does."""
        self._made += 1
        tensor = torch.empty(shape)
        for piece in tensor.view(-1).split(4 << 20):
            piece.copy_(self._pool[self._made : self._made + len(piece)])
        return tensor


def gpt2(size: Size) -> dict[str, Any]:
    """Make the state of a GPT-2 and its Adam without either: importing optimizers takes seconds."""
    random, w = RandomTensors(), size.width
    model = {
        "transformer.wte.weight": random(size.vocabulary, w),
        "transformer.wpe.weight": random(size.context, w),
    }
    for layer in range(size.layers):
        for name, *shape in _BLOCK:
            model[f"transformer.h.{layer}.{name}.weight"] = random(*(w * widths for widths in shape))
            model[f"transformer.h.{layer}.{name}.bias"] = random(w * shape[-1])
    model |= {"transformer.ln_f.weight": random(w), "transformer.ln_f.bias": random(w)}
    tied, source = TIED
    state = {"model": model | {tied: model[source]}, "optimizer": adam_state(model.values(), random)}
    return state | {"step": 1000}


def adam_state(parameters: Iterable[torch.Tensor], random: RandomTensors) -> dict[str, Any]:
    """Make the state dict of an Adam that has taken a thousand steps."""
    moments = {
        index: {
            "step": torch.tensor(1000.0),
            "exp_avg": random(*parameter.shape),
            "exp_avg_sq": random(*parameter.shape),
        }
        for index, parameter in enumerate(parameters)
    }
    groups = [{"lr": 6e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": list(moments)}]
    return {"state": moments, "param_groups": groups}


def distinct_tensors(state: Any) -> list[torch.Tensor]:
    """Return a flat tensor over all of each storage of a state that is not empty."""
    frozen, ranges = Freezer().freeze(state)
    dtypes = {key: dtype for key, dtype, *_ in frozen.tensors}
    return [
        torch.empty(0, dtype=dtypes.get(key, torch.uint8), device=source.device).set_(source)
        for key, source in enumerate(ranges.sources)
        if source.nbytes()
    ]


def bytes_of(state: Any) -> int:
    """Return the bytes of all storages of a state, each counted once."""
    return sum(Freezer().freeze(state)[1].sizes)


def device() -> torch.device:
    """Return where a training would have its state."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
