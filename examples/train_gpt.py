"""Train a small GPT on the source of Python's standard library, saving it in the background.

Kill it at any time and start it again with the same arguments: it continues from its newest checkpoint with
the same losses. Everything about checkpoints is in `train`; the rest is plain PyTorch.

    python examples/train_gpt.py runs/gpt --steps 120
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import sysconfig
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from asyncckpt import BestK, Checkpointer, LastN

if TYPE_CHECKING:
    from asyncckpt import Save

BYTES = 256  # the vocabulary: every byte is a token
CONTEXT = 128
BATCH = 4
WIDTH = 384
HEADS = 6
LAYERS = 6
LEARNING_RATE = 1e-3
WARM_UP = 20  # steps
VALIDATION_BATCHES = 4


def train(arguments: argparse.Namespace, log: Log) -> None:
    """Train up to `arguments.steps`, starting from the newest checkpoint if there is one."""
    torch.manual_seed(0)
    text, held_out = load_corpus()
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "rng": torch.get_rng_state()}

    keep = BestK(3, "val_loss") | LastN(1)
    with Checkpointer(arguments.directory, filename="step-{step:06d}.pt", keep=keep) as ckpt:
        found = ckpt.restore(state, missing_ok=True)
        torch.set_rng_state(state["rng"])
        log.write("start", found=found.path if found else None, step=state["step"], steps=arguments.steps)
        first = state["step"] + 1
        for step in range(first, arguments.steps + 1):
            begin = time.perf_counter()
            loss = train_step(model, optimizer, text, step)
            seconds = time.perf_counter() - begin
            if step == first:  # from now on the optimizer has its state
                begin = time.perf_counter()
                ckpt.reserve(state)
                log.write("reserve", step=step, seconds=time.perf_counter() - begin)
            if step % arguments.save_every == 0:
                val_loss = evaluate(model, held_out)
                state["step"], state["rng"] = step, torch.get_rng_state()
                save = ckpt.save(step, state, metrics={"val_loss": val_loss})
                log.saved(save, step, val_loss)
            elif arguments.compare and (step + arguments.save_every // 2) % arguments.save_every == 0:
                state["step"], state["rng"] = step, torch.get_rng_state()
                log.write("torch.save", step=step, **stock_save(state, arguments.compare))
            log.write("step", step=step, loss=loss, seconds=seconds)
            log.follow()
    log.follow()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, step: int) -> float:
    """Take one optimizer step on a random batch and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP)
    loss = loss_of(model, batch_at(text, torch.randint(len(text) - CONTEXT, (BATCH,))))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Return the loss on fixed batches, without drawing random numbers."""
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, VALIDATION_BATCHES * BATCH).long()
    losses = [loss_of(model, batch_at(held_out, rows)).item() for rows in torch.split(starts, BATCH)]
    return math.fsum(losses) / len(losses)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross entropy of each byte of `batch`, given the bytes before it."""
    logits: Tensor = model(batch[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def batch_at(text: Tensor, starts: Tensor) -> Tensor:
    """Return one row of `text` per entry of `starts`, each one byte longer than the context."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def load_corpus() -> tuple[Tensor, Tensor]:
    """Return the source of the standard library: bytes to train on, bytes of other files to validate on."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    files = [f for f in sorted(library.rglob("*.py")) if not left_out & set(f.relative_to(library).parts)]
    training, validation = (
        bytearray().join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 0) is held_out)
        for held_out in (False, True)
    )
    if min(len(training), len(validation)) <= CONTEXT:
        raise SystemExit(f"{library} holds no source to train on: this Python was installed without it")
    return torch.frombuffer(training, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8)


class Block(nn.Module):
    """One transformer layer: causal attention, then a feed-forward net, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of this layer for `x`."""
        heads = self.qkv(self.norm1(x)).unflatten(2, (3 * HEADS, -1)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        x = x + self.feed(self.norm2(x))
        return x  # noqa: RET504 - has a declared type, which the result of a module call has not


class GPT(nn.Module):
    """A decoder-only transformer of about 10 million parameters, with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        self.apply(self._initialize)
        self.head.weight = self.tokens.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the byte after each of `tokens`."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def stock_save(state: dict[str, Any], directory: Path) -> dict[str, float]:
    """Save `state` with `torch.save`, for comparison, and return what that cost.

    Only `torch.save` counts as the stall. The fsync behind it makes the file durable, and leaves the disk
    idle before the next save is measured.
    """
    path = directory / "state.pt"
    path.unlink(missing_ok=True)  # a new file each time, like every checkpoint
    begin = time.perf_counter()
    torch.save({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}, path)
    stalled = time.perf_counter()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter()
    return {"stall": stalled - begin, "durable": synced - begin, "nbytes": path.stat().st_size}


class Log:
    """Prints events, one JSON object a line, for the process that watches the training."""

    def __init__(self) -> None:
        self._pending: deque[Save] = deque()

    def write(self, event: str, **values: object) -> None:
        """Print one event and flush it."""
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()

    def saved(self, save: Save, step: int, val_loss: float) -> None:
        """Print that `save` has returned; `follow` prints when its checkpoint is durable."""
        self._pending.append(save)
        self.write("save", step=step, val_loss=val_loss, stall=save.stats.stall)

    def follow(self) -> None:
        """Print which saves have become durable since the last call."""
        while self._pending and self._pending[0].committed.done():
            save = self._pending.popleft()
            checkpoint, stats = save.committed.result(), save.stats
            self.write("durable", step=checkpoint.step, durable=stats.durable, nbytes=stats.nbytes)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, help="where the checkpoints are")
    parser.add_argument("--steps", type=int, default=120, help="train up to this step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps (default: %(default)s)")
    parser.add_argument("--compare", type=Path, help="directory to torch.save to as well, between the saves")
    arguments = parser.parse_args()
    train(arguments, Log())


if __name__ == "__main__":
    main()
