"""Register host memory with the CUDA runtime, so that a GPU copies into it at full speed.

torch's own pinned allocator would round a buffer up to the next power of two.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from asyncckpt._snapshot.memory import Mapping

logger = logging.getLogger("asyncckpt")

# Registered in pieces: one that is refused leaves the others, and no copy may cross from piece to piece.
PIECE = 1 << 30
_PORTABLE = 1  # pinned for every device, not only for the current one


def pin(mapping: Mapping) -> bool:
    """Pin all of `mapping`; returns whether that worked."""
    cudart = torch.cuda.cudart()
    done = 0
    for offset in range(0, mapping.nbytes, PIECE):
        length = min(PIECE, mapping.nbytes - offset)
        if int(cudart.cudaHostRegister(mapping.address + offset, length, _PORTABLE)):
            _unregister(mapping, done)
            _clear_error()
            return False
        done = offset + length
    return True


def unpin(mapping: Mapping) -> None:
    """Undo `pin`, which the memory needs before it is unmapped."""
    _unregister(mapping, mapping.nbytes)


def _unregister(mapping: Mapping, nbytes: int) -> None:
    cudart = torch.cuda.cudart()
    for offset in range(0, nbytes, PIECE):
        cudart.cudaHostUnregister(mapping.address + offset)


def _clear_error() -> None:
    """Take the refusal from the runtime, or torch would raise it from whatever kernel it launches next."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.warning("host memory could not be pinned; copies from the GPU will be slower")
