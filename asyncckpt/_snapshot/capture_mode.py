"""Keep the calls of a background thread from breaking the capture of a CUDA graph."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

_THREAD_LOCAL = 1  # of enum cudaStreamCaptureMode


def allow_captures() -> None:
    """Let other threads capture CUDA graphs while the calling thread waits for events.

    A capture in the default mode, "global", fails if any thread waits or allocates meanwhile that is not in
    another mode itself. A runtime that is not linked as in torch's wheels is left as it is.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    with suppress(OSError, AttributeError):
        exchange = ctypes.CDLL(str(path)).cudaThreadExchangeStreamCaptureMode
        exchange(ctypes.byref(ctypes.c_int(_THREAD_LOCAL)))
