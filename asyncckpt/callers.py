"""Where a call into asyncckpt comes from."""

from __future__ import annotations

import inspect


def callers_level() -> int:
    """Return the stack level, as seen by the caller of this function, of the first line outside asyncckpt."""
    level, frame = 1, inspect.currentframe()
    while (frame := frame.f_back if frame else None) and frame.f_globals["__name__"].startswith("asyncckpt."):
        level += 1
    return level
