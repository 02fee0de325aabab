"""Warn of what a caller of asyncckpt does, at the line that does it."""

from __future__ import annotations

import inspect
import warnings


def warn_caller(message: str) -> None:
    """Warn with the stack level of the first line outside asyncckpt."""
    level, frame = 2, inspect.currentframe()
    while (frame := frame.f_back if frame else None) and frame.f_globals["__name__"].startswith("asyncckpt."):
        level += 1
    warnings.warn(message, stacklevel=level)
