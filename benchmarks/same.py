"""Whether a state that was loaded is the one that was saved."""

from __future__ import annotations

from typing import Any

import torch


def difference(expected: Any, found: Any, path: str = "state") -> str | None:
    """Return where two states first differ, or None; tensors are compared bit by bit, dicts in any order."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return None if _same_bits(expected, found.to(expected.device)) else f"{path} has other values"
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            return f"{path} has other keys: {sorted(map(str, expected.keys() ^ found.keys()))[:3]}"
        pairs = [(f"{path}[{key!r}]", expected[key], found[key]) for key in expected]
    elif isinstance(expected, (list, tuple)) and type(expected) is type(found):
        if len(expected) != len(found):
            return f"{path} has {len(found)} entries, not {len(expected)}"
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(expected, found, strict=True))]
    else:
        same = type(expected) is type(found) and expected == found
        return None if same else f"{path} is {found!r}"[:80] + f", not {expected!r}"[:80]
    return next(filter(None, (difference(one, other, where) for where, one, other in pairs)), None)


def sharing(state: Any) -> set[frozenset[str]]:
    """Return the groups of tensors, by their paths, that share memory."""
    groups: dict[int, set[str]] = {}

    def note(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor) and value.numel():
            groups.setdefault(value.untyped_storage().data_ptr(), set()).add(path)
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                note(item, f"{path}/{key}")

    note(state, "")
    return {frozenset(paths) for paths in groups.values() if len(paths) > 1}


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
