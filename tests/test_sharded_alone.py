"""Sharded saves of one process, and what it is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from asyncckpt import Checkpointer
from asyncckpt.stores import LocalStore
from asyncckpt.testing import SlowStore

if TYPE_CHECKING:
    from pathlib import Path


class _Gone:
    """A key-value store whose host has ended."""

    def __getattr__(self, operation: str) -> NoReturn:
        raise RuntimeError(f"{operation}: connection reset by peer")


def test_what_is_committed_is_reported_though_the_other_ranks_cannot_be_told(tmp_path: Path) -> None:
    class Store(SlowStore):
        async def before(self, operation: str, subject: str) -> None:
            if operation == "commit_folder":
                requests: Any = ckpt._ranked.coordination().requests
                requests._store = _Gone()

    with Checkpointer(store=Store(LocalStore(str(tmp_path))), sharded=True) as ckpt:
        save = ckpt.save(1, {"w": torch.ones(3)})
        assert save.committed.result() == ckpt.latest()
