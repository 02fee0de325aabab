"""What is measured in a run of the comparison, and in which order."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from harness import order

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OF_STATES = ("saves", "loads", "memory")
PARTS = (*OF_STATES, "burst", "growth")
STATES = ("gpt2", "resnet", "lora")
# Of one of each kind: how saves grow, every point in a process of its own, and every step beside one.
GROWING = ("torch_save_fsync", "lightning_async", "dcp_cached", "torch_checkpointing", "ours")
POINTS = (
    *(f"bytes:{nbytes}" for nbytes in (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)),
    *(f"tensors:{count}" for count in (10, 100, 1_000, 10_000, 100_000)),
)
WARM = 2  # saves in a process, behind the first one
KEPT = (1, 10, 100, 1_000)
KEEPING = ("torch_save_fsync", "dcp_cached", "ours")


class Job(NamedTuple):
    """Measurements that one process makes one after the other.

    Attributes:
        kinds: in compare_one.py.
        state: its name.
        peer: its key; "limits" for what nobody can beat.
        turn: which repetition this is.
        repeat: saves or loads within the process.
        trace: whether every single step is told.
    """

    kinds: tuple[str, ...]
    state: str
    peer: str
    turn: int
    repeat: int
    trace: bool = False


def _saves(peers: Sequence[str], chosen: Sequence[str], turn: int) -> Iterator[Job]:
    for state in chosen:
        for peer in order(["limits", *peers], turn):
            kind = "bare" if peer == "limits" else "saves"
            trace = turn == 0 and state == chosen[0]
            yield Job((kind,), state, peer, turn, WARM if state == chosen[0] else 2 * WARM, trace)


def _each(kind: str, peers: Sequence[str], chosen: Sequence[str]) -> Iterator[Job]:
    for turn, state in enumerate(chosen):
        for peer in order(peers, turn):
            yield Job((kind,), state, peer, 0, 2)


def _growth(peers: Sequence[str]) -> Iterator[Job]:
    growing = [peer for peer in GROWING if peer in peers]
    for turn, point in enumerate(POINTS if growing else ()):
        for peer in order(["limits", *growing], turn):
            yield Job(("bare" if peer == "limits" else "saves",), point, peer, 0, WARM)
    for turn, count in enumerate(KEPT):
        for peer in order([peer for peer in KEEPING if peer in peers], turn):
            yield Job(("kept",), f"kept:{count}", peer, 0, 2)


def full(peers: Sequence[str], chosen: Sequence[str], parts: Sequence[str], repeat: int) -> Iterator[Job]:
    """Yield all measurements, peers by turns in another order each time.

    Args:
        peers: keys of those that take part.
        chosen: names of states.
        parts: some of `PARTS`.
        repeat: processes for each peer where times of saves of the first state are taken.
    """
    plans = {
        "saves": _saves(peers, chosen, 0),
        "loads": _each("loads", peers, chosen),
        "memory": _each("memory", peers, chosen[:1]),
        "burst": _each("burst", peers, ["resnet"]),
        "growth": _growth(peers),
    }
    yield from chain.from_iterable(plans[part] for part in PARTS if part in parts)
    # At the end, so that a machine that drifts shows in the spread. Small states have theirs in the process.
    for turn in range(1, repeat if "saves" in parts else 1):
        yield from _saves(peers, chosen[:1], turn)


def quick(peers: Sequence[str]) -> Iterator[Job]:
    """Yield one of each kind: does the measuring work, with a small state?"""
    yield Job(("bare",), "gpt2", "limits", 0, 1)
    for peer in peers:
        kinds = ("saves", "loads") if peer in GROWING else ("saves",)
        more = ("memory", "burst") if peer == "ours" else ()
        yield Job((*kinds, *more), "gpt2", peer, 0, 1, trace=True)
    if "ours" in peers:
        yield Job(("kept",), "kept:10", "ours", 0, 1)
