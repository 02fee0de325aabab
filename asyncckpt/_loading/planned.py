"""Load a file that is only planned, from the buffer in which its body lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.unpickle import PayloadFile, load_file

if TYPE_CHECKING:
    from asyncckpt.layout.plan import FilePlan


def load_plan(plan: FilePlan, view: memoryview) -> Any:
    """Return what loading the file of a plan would give, on the CPU, without a copy of its ranges.

    Args:
        plan: of a file for torch.load.
        view: the buffer of its body, which is filled; its literals are put there. The storages of the result
            lie in it.
    """
    size = plan.body.nbytes
    for offset, literal in plan.literals:
        view[offset : offset + len(literal)] = literal

    def read_at(at: int, length: int) -> bytes:
        end = at + length
        return bytes(view[at : min(end, size)]) + plan.tail[max(at - size, 0) : max(end - size, 0)]

    payloads = {
        start: torch.frombuffer(view[start:stop], dtype=torch.uint8).untyped_storage()
        for start, stop in zip(plan.body.starts.tolist(), plan.body.stops.tolist(), strict=True)
        if stop > start
    }
    return load_file(PayloadFile(plan.size, read_at, payloads), "cpu", weights_only=False)
