"""Whether tensors, modules and optimizers can take loaded content, and whether that can fail."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy

# Between these, torch copies in every combination; complex to real is refused before.
_CONVERTIBLE = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
_MODULE_METHODS = (
    "load_state_dict", "_load_from_state_dict", "set_extra_state",
    "state_dict", "_save_to_state_dict", "get_extra_state",
)  # fmt: skip
_MODULE_HOOKS = (
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
)  # fmt: skip
_OPTIMIZER_METHODS = ("load_state_dict", "state_dict", "__setstate__")
_OPTIMIZER_HOOKS = (
    "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
    "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
)  # fmt: skip


def misfit(live: torch.Tensor, saved: Any) -> str | None:
    """Return why `live` cannot take the values of `saved`; None if it can."""
    try:
        return _misfit(live, saved)
    except (RuntimeError, NotImplementedError) as error:  # of a type that lacks even a shape
        return f"cannot be compared with the state's {type(live).__name__}: {error}"


def _misfit(live: torch.Tensor, saved: Any) -> str | None:  # noqa: PLR0911 - one for each reason
    if not isinstance(saved, torch.Tensor):
        return f"a tensor is expected, the checkpoint has a {type(saved).__name__}"
    if is_lazy(live) or is_lazy(saved):
        return f"the tensor in the {'state' if is_lazy(live) else 'checkpoint'} is uninitialized"
    if live.layout is not saved.layout or live.is_quantized is not saved.is_quantized:
        return f"{_kind(saved)} in the checkpoint, {_kind(live)} in the state"
    if saved.is_meta and not live.is_meta:
        return "the checkpoint has a meta tensor, which holds no values"
    if live.is_meta and not saved.is_meta:
        return (
            "the state has a meta tensor, which holds no values; materialize it first, a module with"
            " to_empty(device=...), or call load() and load_state_dict(..., assign=True)"
        )
    if live.shape != saved.shape:
        return f"shape {tuple(saved.shape)} in the checkpoint, {tuple(live.shape)} in the state"
    if saved.is_complex() and not live.is_complex():
        return f"{saved.dtype} in the checkpoint, {live.dtype} in the state"
    strides = live.stride() if live.layout is torch.strided and not live.is_nested else ()
    overlaps = any(step == 0 and size > 1 for size, step in zip(live.shape, strides, strict=False))
    if live.is_inference() or overlaps:
        return "the state's tensor cannot be written: it is expanded, or made in inference mode"
    return None


def copy_cannot_fail(live: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether `live.copy_(saved)` is known to succeed where `misfit` is None."""
    return all(is_dense(tensor) and tensor.dtype in _CONVERTIBLE for tensor in (live, saved))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is memory with strides, and no subclass takes part in its operations."""
    strided = type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided
    return strided and not tensor.is_nested and not tensor.is_quantized


def is_stock(target: Any) -> bool:
    """Whether a module or an optimizer loads by torch's own code alone, without hooks and overrides."""
    if isinstance(target, torch.nn.Module):
        return not torch.__future__.get_swap_module_params_on_conversion() and all(
            _is_stock(part, "torch.nn.modules.", _MODULE_METHODS, _MODULE_HOOKS) for part in target.modules()
        )
    return isinstance(target, torch.optim.Optimizer) and _is_stock(
        target, "torch.optim.", _OPTIMIZER_METHODS, _OPTIMIZER_HOOKS
    )


def _is_stock(target: Any, package: str, methods: tuple[str, ...], hooks: tuple[str, ...]) -> bool:
    kind, own = type(target), vars(target)
    return not any(getattr(target, name) for name in hooks) and all(
        getattr(kind, name).__module__.startswith(package) and name not in own for name in methods
    )


def _kind(tensor: torch.Tensor) -> str:
    return f"{'a quantized' if tensor.is_quantized else 'a'} tensor of layout {tensor.layout}"
