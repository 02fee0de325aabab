"""Make requests to the key-value store of a process group."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from asyncckpt.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncckpt._ranks.group import ProcessGroup

# No value is this. A `compare_set` that expects it changes nothing, and returns the value, or else this.
_NOTHING = b"\x00"
# Bytes of a value in one request. A TCPStore closes the connection on more than 8 MiB; that of torch 2.7, at
# times, on more than 64 KiB.
PIECE = 32 << 10
# How many have been made of each name and rank, by store: a group that is formed again starts from 0.
_made: WeakKeyDictionary[Any, Counter[tuple[str, int]]] = WeakKeyDictionary()


class Requests:
    """The requests of one rank, with keys of their own. No request waits for a key.

    The connection is made with the first request. The k-th ones of a name, in the order in which their first
    requests are made, have the same keys on all ranks.

    Args:
        group: of the ranks.
        name: of these keys.
    """

    def __init__(self, group: ProcessGroup, name: str) -> None:
        self._group = group
        self._name = name
        self._store: Any = None
        self._prefix = ""
        self._connecting = Lock()
        self._numbers = count()
        self._since: dict[int, float] = {}  # when the requests began that have no answer yet

    def peek(self, key: str) -> bytes | None:
        """Return the value of a key, None if it has none."""
        value: bytes = self._request("compare_set", key, _NOTHING, _NOTHING)
        return None if value == _NOTHING else value

    def swap(self, key: str, old: bytes | None, new: bytes) -> bytes:
        """Set a key if its value is `old`; return the value that it has then, `old` if it has none."""
        value: bytes = self._request("compare_set", key, old or b"", new)
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return its value; one that does not exist is 0."""
        value: int = self._request("add", key, amount)
        return value

    def append(self, key: str, value: bytes) -> None:
        """Append to a value, of any length."""
        for start in range(0, len(value), PIECE):
            self._request("append", key, value[start : start + PIECE])

    def delete(self, *keys: str) -> None:
        """Delete keys, which need not exist."""
        for key in keys:
            self._request("delete_key", key)

    def silence(self) -> float:
        """Return for how many seconds the oldest unanswered request has waited."""
        now = time.monotonic()
        return now - min(tuple(self._since.values()), default=now)

    def _request(self, operation: str, key: str, *args: Any) -> Any:
        number = next(self._numbers)
        self._since[number] = time.monotonic()
        try:
            with _store_errors():
                with self._connecting:
                    if self._store is None:
                        self._connect()
                return getattr(self._store, operation)(self._prefix + key, *args)
        finally:
            del self._since[number]

    def _connect(self) -> None:
        group = self._group
        store = group.connect()
        made, this = _made.setdefault(group.store, Counter()), (self._name, group.rank)
        self._prefix = f"asyncckpt/{self._name}/{made[this]}/"
        made[this] += 1
        self._store = store


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the process that hosts the store may have ended
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RankError(
            "the store of the process group failed; has the process that hosts it (rank 0, or the launcher)"
            f" ended? {reason}"
        ) from error
