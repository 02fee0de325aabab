"""Simulated ranks that send real messages: some in each process, which act one after the other."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch.distributed

from asyncckpt._ranks.arrivals import Arrivals, Note, Stage
from asyncckpt._ranks.calls import Call
from asyncckpt._ranks.coordination import Coordination
from asyncckpt._ranks.decision import Phase
from asyncckpt._ranks.group import ProcessGroup
from asyncckpt._ranks.round import Round
from coordination_stock import stock_plan

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.connection import Connection

dist: Any = torch.distributed
REPORT = 128  # bytes that a rank reports: offsets and lengths of some byte items
PATIENCE = 600.0  # seconds


class Counted:
    """A store that counts requests, and the bytes of keys and values in both directions."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = self.bytes = 0

    def _request(self, name: str, *args: Any) -> Any:
        answer = getattr(self._store, name)(*args)
        self.requests += 1
        self.bytes += sum(len(part) if isinstance(part, str | bytes) else 8 for part in (*args, answer))
        return answer

    def compare_set(self, *args: Any) -> Any:
        """Change a value if it is as expected."""
        return self._request("compare_set", *args)

    def add(self, *args: Any) -> Any:
        """Add to a counter."""
        return self._request("add", *args)

    def append(self, *args: Any) -> Any:
        """Append to a value."""
        return self._request("append", *args)

    def delete_key(self, *args: Any) -> Any:
        """Delete a key."""
        return self._request("delete_key", *args)


def host(ends: Connection) -> None:
    """Host the store, until told to end."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ends.send(store.port)
    ends.recv()


def connect(port: int) -> Counted:
    """Return a connection to the store."""
    return Counted(dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False))


class Ranks:
    """Some ranks of a group, in one process, which act one after the other.

    Args:
        port: of the store.
        ranks: which.
        total: how many there are in all.
    """

    def __init__(self, port: int, ranks: Iterable[int], total: int) -> None:
        self.store = connect(port)
        self.ranks = [
            Coordination(ProcessGroup(self.store, rank, total), "bench", PATIENCE) for rank in ranks
        ]
        self.rounds: list[Round] = []
        self.plan = pickle.dumps(stock_plan(1, total))

    def act(self, phase: str, number: int) -> None:
        """Do what each rank does in a phase of a save, without the threads that it has for each call."""
        if phase == "come":
            for ranks in self.ranks:
                note = Note(ranks.rank, f"save({number})", ["changed"] if number == 0 else [], None)
                Arrivals(ranks.requests, number, ranks.size).enter(note)
        elif phase == "learn":
            for ranks in self.ranks:
                assert Arrivals(ranks.requests, number, ranks.size).look().stage is Stage.DONE
            self.rounds = [Round(ranks, number) for ranks in self.ranks]
        else:
            for save in self.rounds:
                getattr(self, phase)(save)

    def gather(self, save: Round) -> None:
        """Send the plan of a rank."""
        save._send("plans", self.plan, Phase.GATHERED)

    def scatter(self, save: Round) -> None:
        """Receive what a rank keeps."""
        save._scatter(None, Call())

    def write(self, save: Round) -> None:
        """Learn that the save has begun, and report that a rank has written."""
        save._wait(Phase.BEGUN, Call(), str)
        save._send("reports", bytes(REPORT), Phase.REPORTED)

    def end(self, save: Round) -> None:
        """Learn that the save is committed."""
        save._wait(Phase.ENDED, Call(), str)
        save._leave()


def work(ends: Connection, port: int, ranks: range, total: int) -> None:
    """Act as some ranks; answer with the requests and bytes of all of them."""
    group = Ranks(port, ranks, total)
    ends.send((0, 0))
    while (task := ends.recv()) is not None:
        before = group.store.requests, group.store.bytes
        group.act(*task)
        ends.send((group.store.requests - before[0], group.store.bytes - before[1]))
