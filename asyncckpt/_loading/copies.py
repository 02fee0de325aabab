"""Copy loaded tensors into live ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from asyncckpt._loading.fitting import is_dense
from asyncckpt._snapshot.copy_threads import for_each_piece
from asyncckpt._snapshot.lanes import memmove

if TYPE_CHECKING:
    from collections.abc import Sequence

    # Addresses of target and source, and how many bytes.
    Move = tuple[int, int, int]

# A few threads share a copy in pieces of this many bytes.
_PIECE = 4 << 20
# Up to this size torch copies on the calling thread alone, and faster.
_SMALL = 32 << 10


class Copy(NamedTuple):
    """A copy of a loaded tensor into a live one, which cannot fail: neither shape nor type is in the way."""

    path: str
    target: torch.Tensor
    source: torch.Tensor


def copy_tensors(copies: Sequence[Copy], begun: list[str]) -> None:
    """Copy tensors; return or raise once nothing is copied any more.

    Bytes that stay as they are move without torch, whose threads wait for each other where other programs use
    the cores. Copies to GPUs are queued on the current streams, and waited for together.

    Args:
        copies: in this order, wherever targets overlap.
        begun: the path of each is appended before its copy begins.
    """
    moves = _moves(copies)
    begun.extend(path for (path, *_), move in zip(copies, moves, strict=True) if move)
    # Whoever looks at version counters has to see the change, an overlapped save for one.
    torch.autograd.graph.increment_version([c.target for c, move in zip(copies, moves, strict=True) if move])
    for_each_piece(lambda piece: memmove(*piece), _pieces(moves))
    devices = {target.device for _, target, _ in copies if target.is_cuda}
    try:
        with torch.no_grad():
            for (path, target, source), move in zip(copies, moves, strict=True):
                if not move:
                    begun.append(path)
                    target.copy_(source, non_blocking=target.is_cuda)
    finally:
        for device in devices:
            torch.cuda.current_stream(device).synchronize()


def _moves(copies: Sequence[Copy]) -> Sequence[Move | None]:
    """Return what each copy moves, one run of bytes to another; None where torch has to copy.

    All are None if a byte is a target of two different copies, the later one of which counts.
    """
    moves = [_move(target, source) for _, target, source in copies]
    spans = {(move[0], move[0] + move[2], move[1]) for move in moves if move}  # a tied tensor once
    others = [c.target for c, move in zip(copies, moves, strict=True) if not move and c.target.is_cpu]
    end = 0
    for start, stop, *_ in sorted([*spans, *map(_span, others)]):
        if start < end:
            return [None] * len(copies)
        end = stop
    return moves


def _move(target: torch.Tensor, source: torch.Tensor) -> Move | None:
    # Code of the user's may have changed the shape since that was compared.
    alike = target.dtype is source.dtype and target.shape == source.shape
    if alike and target.nbytes > _SMALL and all(map(_is_run, (target, source))):
        return target.data_ptr(), source.data_ptr(), target.nbytes
    return None


def _is_run(tensor: torch.Tensor) -> bool:
    """Whether the elements lie in host memory one after another, as they are."""
    plain = is_dense(tensor) and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.is_cpu and tensor.is_contiguous()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return from where to where a tensor may lie: itself, or all of its storage."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _pieces(moves: Sequence[Move | None]) -> list[Move]:
    return [
        (target + at, source + at, min(_PIECE, nbytes - at))
        for target, source, nbytes in dict.fromkeys(move for move in moves if move)
        for at in range(0, nbytes, _PIECE)
    ]
