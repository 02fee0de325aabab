"""Waits for changes by other threads."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from asyncckpt._threads import Condition


def test_waits_end_however_short_they_are() -> None:
    condition = Condition()

    def wait() -> None:
        for _ in range(20_000):
            condition.until(lambda: False, 1e-6)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.timeout(30)
def test_a_wait_ends_at_its_timeout_though_a_signal_handler_takes_longer() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.3))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert not Condition().until(lambda: False, 0.2)
    finally:
        signal.signal(signal.SIGALRM, before)
