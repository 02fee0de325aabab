"""Folders for tests: states saved by stock DCP in this process, described as asyncckpt describes its own."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import seal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

DATA = "__0_0.distcp"
MARK = ".metadata"


def save_by_stock(path: Path, state: dict[str, Any]) -> Path:
    """Save a state as one process does; returns the path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=path)
    return path


def save_described(
    directory: Path,
    step: int,
    state: dict[str, Any],
    *,
    metrics: Mapping[str, float] | None = None,
    sequence: int = 0,
) -> Path:
    """Save a state as a folder of the series `step-{step:08d}.pt`; returns its path."""
    path = save_by_stock(directory / f"step-{step:08d}", state)
    nbytes = sum(file.stat().st_size for file in path.iterdir())
    described = Description(
        sequence or step, step, metrics or {}, 1.5, {}, "step-{step:08d}.pt", nbytes=nbytes, ranks=1
    )
    mark = path / MARK
    mark.write_bytes(seal(mark.read_bytes(), described.encode()))
    return path


def change_metadata(path: Path, change: Callable[[Any], object]) -> None:
    """Change the metadata of a folder of stock DCP: what `change` does to it, or returns."""
    mark = path / MARK
    metadata = pickle.loads(mark.read_bytes())
    changed = change(metadata)
    mark.write_bytes(pickle.dumps(metadata if changed is None else changed))


def some_state(seed: int = 1) -> dict[str, Any]:
    """Return a state of tensors and values, nested as programs nest them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model": {"weight": random(3, 4), "bias": random(4).bfloat16(), "count": torch.tensor(seed)},
        "opt": {
            "state": {0: {"step": torch.tensor(float(seed)), "exp_avg": random(3, 4)}},
            "param_groups": [{"lr": 0.1 * seed, "betas": (0.9, 0.99), "params": [0, 1]}],
        },
        "list": [random(2), {"a": seed, "b": f"text {seed}"}, 5],
        "large": random(300, 200),
        "empty": random(0, 4),
        "step": seed,
        "history": [1.5, seed],
    }
