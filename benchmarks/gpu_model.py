"""A GPT of any size and its training, as GPU jobs have it: bf16 autocast and a fused AdamW."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

_RATE = 1e-4
_TIMED = 5  # steps, for the time of one
_MANY = 8  # sequences in a batch, beside a single one, to see what a sequence costs


class Shape(NamedTuple):
    """The numbers that the shapes of a GPT follow from."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257
    context: int = 1024


MEDIUM = Shape(layers=24, width=1024, heads=16)  # 355 M parameters
# As many in few layers: launching the kernels of 24 layers alone takes more than the 10 ms of a short step.
WIDE = Shape(layers=6, width=1920, heads=30)
TINY = Shape(layers=2, width=64, heads=2, vocabulary=512, context=64)


class Block(nn.Module):
    """Causal attention, then a feed-forward net, each with a residual connection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self._heads = shape.width, shape.heads
        self.before_attention = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.before_feeding = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of this layer."""
        projected = self.attend(self.before_attention(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in projected)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended: Tensor = x + self.project(seen.transpose(1, 2).flatten(2))
        fed: Tensor = self.narrow(nn.functional.gelu(self.widen(self.before_feeding(attended))))
        return attended + fed


class GPT(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean cross entropy of each token, given those before it."""
        read, expected = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(read) + self.positions.weight[: read.shape[1]]
        logits = nn.functional.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten())


class GPTTraining:
    """A training on random tokens.

    Args:
        shape: of the model.
        device: where it is, "cpu" or "cuda".

    Attributes:
        model, optimizer: what is trained, and how.
        batch: sequences in a step.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        self._shape, self._device = shape, device
        with torch.device(device):
            self.model = GPT(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=_RATE, fused=True)
        self.take(1)
        self.step()  # from now on the optimizer has its state

    def take(self, batch: int) -> None:
        """Train with as many sequences in a step from now on."""
        self.batch = batch
        size = batch, self._shape.context + 1
        self._tokens = torch.randint(self._shape.vocabulary, size, device=self._device)

    def backward(self) -> Tensor:
        """Compute the gradients of a step; returns the loss."""
        with torch.autocast(self._device, torch.bfloat16):
            loss: Tensor = self.model(self._tokens)
        self.optimizer.zero_grad()
        loss.backward()
        return loss

    def step(self, fence: Callable[[], object] = lambda: None) -> float:
        """Take a step, `fence` called before the parameters change; returns the loss, as a log has it."""
        loss = self.backward()
        fence()
        self.optimizer.step()
        return loss.item()

    def seconds(self) -> float:
        """Return the median time of a step."""
        times = []
        for _ in range(_TIMED):
            began = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - began)
        return median(times)

    def last(self, seconds: float) -> None:
        """Choose a batch with which a step takes about as long."""
        taken = []
        for batch in (1, _MANY):
            self.take(batch)
            self.step()
            taken.append(self.seconds())
        alone, many = taken
        each = max(many - alone, 1e-9) / (_MANY - 1)
        self.take(max(1, min(8 * _MANY, 1 + round((seconds - alone) / each))))
        self.step()

    def state(self, step: int) -> dict[str, Any]:
        """Return what is saved."""
        return {"model": self.model, "opt": self.optimizer, "step": step}

    def state_dicts(self, step: int) -> dict[str, Any]:
        """Return what is in a checkpoint of that."""
        return {"model": self.model.state_dict(), "opt": self.optimizer.state_dict(), "step": step}
