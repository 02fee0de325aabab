"""Divide what a sharded strategy saves into what all ranks write, and what the first rank writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Module
from torch.optim import Optimizer

from asyncckpt._snapshot.local_tensors import is_dtensor
from asyncckpt._stateful import is_stateful

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Filters = Mapping[str, Callable[[str, Any], bool]]
    Divided = tuple[dict[str, Any], dict[str, Any]]


def of_trainer(checkpoint: Mapping[str, Any], weights: str) -> Divided:
    """Divide the checkpoint of a Trainer, as its strategies do.

    Args:
        checkpoint: with the state dicts that the strategy has made.
        weights: the name of the weights in the directory.
    """
    rest = dict(checkpoint)
    shards = {weights: rest.pop("state_dict")}
    states = rest.pop("optimizer_states", [])
    return shards | {f"optimizer_{index}": state for index, state in enumerate(states)}, rest


def of_fabric(state: Mapping[str, Any], filters: Filters | None, *, fsdp: bool) -> Divided | None:
    """Divide the objects given to `fabric.save`, as its strategies do.

    Args:
        state: the objects.
        filters: for some of its keys, which entries of a state dict to save.
        fsdp: whether the strategy is `FSDPStrategy`, which takes no filters.

    Returns:
        State dicts, and the rest; None if Lightning does not save this.
    """
    is_sharded = _has_fsdp if fsdp else _has_dtensors
    sharded = [value for value in state.values() if isinstance(value, Module) and is_sharded(value)]
    if len(sharded) != 1 or (fsdp and filters is not None):
        return None
    states = (_of_fsdp if fsdp else _of_dtensors)(sharded[0], state)
    rest = {
        key: value.state_dict() if is_stateful(value) else value
        for key, value in state.items()
        if key not in states
    }
    for key, keeps in (filters or {}).items():
        part = states if key in states else rest
        if isinstance(part[key], dict):
            part[key] = {name: value for name, value in part[key].items() if keeps(name, value)}
            if not part[key]:
                del part[key]
    return states, rest


def _of_fsdp(module: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817, PLC0415 - it is imported
    from torch.distributed.fsdp import StateDictType  # noqa: PLC0415 - as above
    from torch.distributed.fsdp.api import (  # noqa: PLC0415 - as above
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
    )

    states: dict[str, Any] = {}
    with FSDP.state_dict_type(
        module,
        StateDictType.SHARDED_STATE_DICT,
        # It makes copies, for which a GPU may have no memory.
        ShardedStateDictConfig(offload_to_cpu=True),
        ShardedOptimStateDictConfig(offload_to_cpu=True),
    ):
        for key, value in state.items():
            if isinstance(value, Module):
                states[key] = value.state_dict()
            elif isinstance(value, Optimizer):
                states[key] = FSDP.optim_state_dict(module, value)
    return states


def _of_dtensors(module: Module, state: Mapping[str, Any]) -> dict[str, Any]:
    states: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Module):
            states[key] = live_weights(value)
        elif isinstance(value, Optimizer):
            states[key] = live_optimizer(module, value)
    return states


def live_weights(module: Module) -> dict[str, Any]:
    """Return the DTensors of a module by fully qualified names, on their device."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415 - it takes long

    return get_model_state_dict(module)


def live_optimizer(module: Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer by the fully qualified names of its parameters, on their device."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: PLC0415 - as above

    return dict(get_optimizer_state_dict(module, optimizer))


def _has_fsdp(module: Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - it is imported

    return any(isinstance(child, FullyShardedDataParallel) for child in module.modules())


def _has_dtensors(module: Module) -> bool:
    return any(is_dtensor(parameter) for parameter in module.parameters())
