"""The arena: what is leased, what is kept, what is given back, and the cap."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt import BusyError, SaveError
from asyncckpt._snapshot.arena import Arena, Lease
from asyncckpt._snapshot.copy import Watermark, copy_ranges
from asyncckpt._snapshot.ranges import ranges_of

MIB = 1 << 20


def test_a_released_buffer_is_used_again() -> None:
    arena = Arena()
    first = arena.lease(MIB)
    address = first.address
    first.view[:4] = b"abcd"
    first.release()
    second = arena.lease(MIB)
    assert second.address == address
    assert address % 4096 == 0
    assert (arena.statistics().mapped, arena.statistics().leases) == (MIB, 1)


def test_memory_may_be_released_by_the_thread_that_prepares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, released = Arena(), threading.Event()

    def release(*_: object) -> None:  # as a finalizer that closes a Checkpointer
        arena.release()
        released.set()

    monkeypatch.setattr("asyncckpt._snapshot.arena.logger.debug", release)
    arena.set_limit(1)
    arena.prepare(MIB, None)
    assert released.wait(10)


def test_a_leased_buffer_is_never_leased_again() -> None:
    arena = Arena()
    leases = [arena.lease(MIB) for _ in range(3)]
    assert len({lease.address for lease in leases}) == 3
    leases[1].release()
    assert arena.lease(MIB).address == leases[1].address


def test_a_state_that_grows_does_not_leave_its_old_buffer_behind() -> None:
    arena = Arena()
    for size in (1, 2, 4, 8):
        arena.lease(size * MIB).release()
    assert arena.statistics().mapped == 8 * MIB


def test_states_of_two_sizes_in_turn_use_one_buffer() -> None:
    arena = Arena()
    for size in (8, 2, 8, 2):
        arena.lease(size * MIB).release()
    assert arena.statistics().mapped == 8 * MIB


def test_the_cap_makes_a_lease_wait_for_another() -> None:
    arena = Arena(limit=3 * MIB)
    held = arena.lease(2 * MIB)
    with pytest.raises(BusyError, match="no room"):
        arena.lease(2 * MIB, wait=False)
    got: list[Lease] = []
    waiter = threading.Thread(target=lambda: got.append(arena.lease(2 * MIB)))
    waiter.start()
    assert not got
    held.release()
    waiter.join(30)
    assert got[0].address == held.address
    assert arena.statistics().high_water == 2 * MIB


def test_what_can_never_fit_fails_at_once() -> None:
    arena = Arena(limit=MIB)
    with pytest.raises(SaveError, match=r"2097152 bytes exceeds .*set_memory_limit"):
        arena.lease(2 * MIB)
    assert arena.statistics().leases == 0


def test_a_reservation_makes_free_buffers() -> None:
    arena = Arena(limit=5 * MIB)
    arena.reserve(2 * MIB, 3)
    statistics = arena.statistics()
    assert (statistics.mapped, statistics.leases) == (4 * MIB, 0)
    assert repr(arena) == "<Arena leases=0 leased=0 mapped=4194304 high_water=4194304>"
    arena.release()
    assert arena.statistics().mapped == 0


def test_a_lower_cap_gives_memory_back() -> None:
    arena = Arena()
    held = arena.lease(8 * MIB)
    arena.lease(4 * MIB).release()
    arena.set_limit(2 * MIB)
    assert arena.statistics().mapped == 8 * MIB
    held.release()
    assert arena.statistics().mapped == 0
    arena.lease(MIB).release()
    assert arena.statistics().mapped == MIB


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 16), st.booleans()), max_size=30), st.integers(16, 40))
def test_never_more_is_mapped_than_was_once_needed_at_once(steps: list[tuple[int, bool]], limit: int) -> None:
    """Whatever is leased and released: no overlap, and mapped stays within cap and high water."""
    page = 4096
    arena = Arena(limit=limit * page)
    held: list[Lease] = []
    for pages, release in steps:
        if release and held:
            held.pop(0).release()
        try:
            held.append(arena.lease(pages * page, wait=False))
        except BusyError:
            continue
        statistics = arena.statistics()
        assert statistics.leases == len(held) == len({lease.address for lease in held})
        assert statistics.leased <= statistics.mapped <= statistics.high_water <= limit * page
    for lease in held:
        lease.release()
    assert arena.statistics().leases == 0
    arena.release()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_memory_and_threads_go_back_to_the_system_and_can_be_had_anew() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    arena, nbytes = Arena(), 64 * MIB
    source = torch.ones(nbytes, dtype=torch.uint8)
    for _ in range(2):
        before = resident()
        held, other = arena.lease(nbytes), arena.lease(nbytes)
        copy_ranges(ranges_of([source]), [0], held, Watermark())
        assert bytes(held.view[-3:]) == b"\1\1\1"
        other.release()
        assert resident() - before > 1.9 * nbytes
        arena.release()
        assert arena.statistics().mapped == nbytes  # what is leased stays
        assert held.view[0] == 1
        held.release()
        arena.release()
        assert resident() - before < 0.1 * nbytes
        assert arena.statistics().mapped == 0
    for thread in threading.enumerate():
        if thread.name == "asyncckpt-copy":
            thread.join(30)
            assert not thread.is_alive()


def test_leases_and_releases_in_many_threads_share_no_buffer() -> None:
    arena, wrong = Arena(limit=4 * MIB), []

    def work(number: int) -> None:
        for _ in range(50):
            lease = arena.lease(MIB)
            lease.view[:8] = number.to_bytes(8, "little")
            arena.release()
            if lease.view[:8] != number.to_bytes(8, "little"):
                wrong.append(number)
            lease.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    arena.release()
    assert arena.statistics().mapped == arena.statistics().leases == 0
