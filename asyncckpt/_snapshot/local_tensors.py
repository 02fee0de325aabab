"""The tensor in which this process holds its part of a distributed one."""

from __future__ import annotations

import sys
from typing import Any

import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor; any other tensor as it is."""
    if type(tensor) in PLAIN or not is_a(tensor, "torch.distributed.tensor", "DTensor"):
        return tensor
    local: Any = tensor._local_tensor  # type: ignore[attr-defined]
    if is_a(local, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        local = local.wait()
    found: torch.Tensor = local
    return found


def is_a(value: object, module: str, name: str) -> bool:
    """Return whether `value` is an instance of a class in a module that this call does not import."""
    # There is no such object as long as nobody has imported its class, which takes a while.
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)
