"""Press Ctrl-C at each point of a call at which the interpreter runs signal handlers."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import asyncckpt
from asyncckpt._saving.engine import get_engine
from asyncckpt._snapshot.memory import _unmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from typing_extensions import Self

    from asyncckpt import Checkpointer

# The interpreter runs signal handlers when a Python function begins, and behind a call of one in C.
_POINTS = {"call", "c_return"}
# What these raise is printed and dropped: exceptions of signal handlers, too.
_SWALLOWING = {"__del__", "_remove", "_commit_removals"}


class Interrupt:
    """Sends SIGINT, or raises an error, at the n-th point of a `with` block in the main thread.

    Attributes:
        came: whether there were as many points.
        where: the point.
    """

    def __init__(self, number: int, error: type[Exception] | None = None) -> None:
        self._error = error
        self.came = False
        self.where = ""
        self._left = number

    def __enter__(self) -> Self:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, _: object) -> None:
        if event not in _POINTS or frame.f_code is Interrupt.__exit__.__code__:
            return
        self._left -= 1
        if self._left < 0 and not any(caller.f_code.co_name in _SWALLOWING for caller in _stack(frame)):
            sys.setprofile(None)
            self.came = True
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name} {event}"
            if self._error is not None:
                raise self._error("injected")
            signal.raise_signal(signal.SIGINT)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def interrupt_everywhere(
    call: Callable[[], object],
    before: Callable[[], object],
    after: Callable[[str], object],
    error: type[Exception] | None = None,
    *,
    stride: int = 1,
) -> int:
    """Call `call` again and again, interrupted at the first point, the second, and so on, until it ends.

    Args:
        call: what is interrupted.
        before: called before each.
        after: called behind each interrupt, with the point at which it came; to look at what is left.
        error: what fails there, in place of a Ctrl-C.
        stride: interrupt it at every so-many-th point only.

    Returns:
        How many points there were, rounded up to the stride.
    """
    number, expected = 0, (KeyboardInterrupt, asyncckpt.AsyncCkptError, error or KeyboardInterrupt)
    gc.freeze()  # what is there already need not be looked at each time
    while True:
        before()
        interrupt = Interrupt(number, error)
        try:
            with interrupt:
                call()
        except expected as raised:
            raised.__traceback__ = None  # it holds what the frames had
        if not interrupt.came:
            gc.unfreeze()
            return number
        gc.collect()
        after(interrupt.where)
        number += stride


def held() -> tuple[int, int, int, int]:
    """Return how many leases, mappings of the arena, descriptors and threads of asyncckpt there are."""
    gc.collect()
    finalizers: Any = weakref.finalize
    mapped = sum(f.func is _unmap and f.args[-1] is not None for f in finalizers._registry.values())
    # Worker threads of anyio come and go.
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("asyncckpt")]
    return get_engine().arena.statistics().leases, mapped, len(os.listdir("/proc/self/fd")), len(threads)  # noqa: PTH208


def settle(ckpt: Checkpointer) -> None:
    """Wait for what is pending; what was broken off may be told of once."""
    try:
        ckpt.wait(30)
    except asyncckpt.SaveError:
        ckpt.wait(30)


def wait_until(condition: Callable[[], bool], message: str) -> None:
    """Wait until a condition holds that nobody tells of."""
    end = time.monotonic() + 80
    while not condition():
        assert time.monotonic() < end, (message, held())
        time.sleep(0.002)
