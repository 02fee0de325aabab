"""Waits for changes by other threads."""

from __future__ import annotations

import signal
import time

import pytest

from asyncckpt._threads import Condition


@pytest.mark.timeout(30)
def test_a_wait_ends_at_its_timeout_though_a_signal_handler_takes_longer() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.3))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert not Condition().until(lambda: False, 0.2)
    finally:
        signal.signal(signal.SIGALRM, before)
