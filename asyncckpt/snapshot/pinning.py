"""Register host memory with the CUDA runtime, so that a GPU copies into it at full speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from asyncckpt.snapshot.memory import Mapping

# Registered in pieces: one that is refused leaves the others, and no copy may cross from piece to piece.
PIECE = 1 << 30


def pin(mapping: Mapping) -> bool:
    """Pin all of `mapping`; returns whether that worked. torch's allocator would round up to a power of two."""
    cudart = torch.cuda.cudart()
    done = 0
    for offset in range(0, mapping.nbytes, PIECE):
        length = min(PIECE, mapping.nbytes - offset)
        if int(cudart.cudaHostRegister(mapping.address + offset, length, 0)):
            _unregister(mapping, done)
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
