"""Several threads share the pieces of a copy; errors and progress are those of the whole."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt._snapshot.copy_threads import for_each_piece


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 40))
def test_each_piece_is_done_once_and_reported_in_order(count: int) -> None:
    done: list[int] = []
    reported: list[int] = []

    def report(front: int) -> None:
        assert set(range(front)) <= set(done)
        reported.append(front)

    for_each_piece(done.append, range(count), report)
    assert Counter(done) == Counter(range(count))
    assert reported == sorted(set(reported))
    assert reported[-1:] == ([count] if count else [])


@pytest.mark.parametrize("failing", [0, 5, 19])
def test_an_error_is_raised_once_no_thread_is_at_work(failing: int) -> None:
    working: list[int] = []

    def do(piece: int) -> None:
        working.append(piece)
        try:
            if piece == failing:
                raise OSError(f"piece {piece}")
        finally:
            working.remove(piece)

    with pytest.raises(OSError, match=f"piece {failing}"):
        for_each_piece(do, range(20))
    assert not working


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    for_each_piece(lambda _: None, range(20))
    for thread in set(threading.enumerate()) - before:
        if thread.name == "asyncckpt-copy":
            thread.join(30)
            assert not thread.is_alive()
