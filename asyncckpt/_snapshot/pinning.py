"""Register host memory with the CUDA runtime, so that a GPU copies into it at full speed.

torch's own pinned allocator would round a buffer up to the next power of two.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from asyncckpt._snapshot.memory import Mapping

logger = logging.getLogger("asyncckpt")

# Registered in pieces, since each holds up other calls of CUDA meanwhile. No copy may cross from piece to piece.
PIECE = 256 << 20
_PORTABLE = 1  # pinned for every device, not only for the current one


def pin(mapping: Mapping) -> bool:
    """Pin all of `mapping`; returns whether that worked."""
    cudart = torch.cuda.cudart()
    for offset in range(0, mapping.nbytes, PIECE):
        length = min(PIECE, mapping.nbytes - offset)
        refusal = cudart.cudaHostRegister(mapping.address + offset, length, _PORTABLE)
        if int(refusal):
            _unregister(mapping, offset)
            # Or torch would raise the refusal from whatever kernel it launches next.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            logger.warning(
                "%d MiB of host memory could not be pinned (%s, after %d MiB): copies from the GPU are"
                " slower, and overlapped ones hold up training; raise the limit of locked memory (ulimit -l;"
                " for a container --ulimit memlock=-1), or let fewer processes save on this host",
                mapping.nbytes >> 20,
                cudart.cudaGetErrorString(refusal),
                offset >> 20,
            )
            return False
    return True


def current_device() -> int:
    """Return the CUDA device of the calling thread."""
    return torch.cuda.current_device()


def unpin(mapping: Mapping, device: int) -> None:
    """Undo `pin`, which the memory needs before it is unmapped.

    Args:
        mapping: the memory.
        device: the current one when it was pinned: on another thread that is the first one, on which this
            process may have no context yet.
    """
    with torch.cuda.device(device):
        _unregister(mapping, mapping.nbytes)


def _unregister(mapping: Mapping, nbytes: int) -> None:
    cudart = torch.cuda.cudart()
    for offset in range(0, nbytes, PIECE):
        cudart.cudaHostUnregister(mapping.address + offset)
