"""Ranks of a group as threads of one process, with a real store between them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed

from asyncckpt._ranks.coordination import Coordination
from asyncckpt._ranks.group import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

T = TypeVar("T")

KINDS = ["hash", "tcp", "file"]
dist: Any = torch.distributed  # its stores have no types


class Stores:
    """A store, as each rank has it.

    Args:
        kind: of the store.
        directory: for the file of a FileStore.
        size: how many ranks there are.
    """

    def __init__(self, kind: str, directory: Path, size: int) -> None:
        self.kind, self.size = kind, size
        if kind == "file":
            self.stores: list[Any] = [dist.FileStore(str(directory / "store"), size) for _ in range(size)]
        elif kind == "tcp":
            self.stores = [tcp_store()]
            self.stores += [tcp_store(self.stores[0].port) for _ in range(size - 1)]
        else:
            self.stores = [hash_store()] * size
        self._before: int = self.stores[0].num_keys()

    def coordinations(self, timeout: float = 60.0, name: str = "test") -> list[Coordination]:
        """Return that of each rank."""
        return [
            Coordination(ProcessGroup(dist.PrefixStore("group", store), rank, self.size), name, timeout)
            for rank, store in enumerate(self.stores)
        ]

    def left(self) -> int:
        """Return how many keys there are that were not there at first."""
        keys: int = self.stores[0].num_keys()
        return keys - self._before


def hash_store() -> Any:
    """Return a store in memory."""
    return dist.HashStore()


def tcp_store(port: int = 0) -> Any:
    """Return a store, or a connection to the one at a port of this host."""
    return dist.TCPStore("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)


def together(ranks: Sequence[T], body: Callable[[T], Any]) -> list[Any]:
    """Call `body` with each of `ranks`, all at once; return the results, or the errors that were raised."""
    results: list[Any] = [None] * len(ranks)

    def run(place: int) -> None:
        try:
            results[place] = body(ranks[place])
        except BaseException as error:  # noqa: BLE001 - a result
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), results
    return results


def failures(results: Sequence[Any]) -> list[str]:
    """Return the texts of errors; all results are."""
    assert all(isinstance(result, BaseException) for result in results), results
    return [f"{type(result).__name__}: {result}" for result in results]
