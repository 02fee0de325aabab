"""Waits for changes by other threads."""

from __future__ import annotations

import threading

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
