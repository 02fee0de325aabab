"""State dicts of FullyShardedDataParallel, which shards flat parameters: made and loaded by DCP.

Its state dicts are new tensors, and collectives make them. FSDP2 (`fully_shard`) is no part of this.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer


def has_flat_parameters(module: Module) -> bool:
    """Whether a FullyShardedDataParallel is in a module."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return kind is not None and any(isinstance(part, kind) for part in module.modules())


def flat_module_state(module: Module) -> dict[str, Any]:
    """Return the shards of a module's state under full names."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415 - see __init__

    return get_model_state_dict(module)


def load_flat_module(module: Module, state: dict[str, Any]) -> None:
    """Load what `flat_module_state` has returned."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict  # noqa: PLC0415 - see __init__

    set_model_state_dict(module, state)


def flat_optimizer_state(module: Module, optimizer: Optimizer, *, fresh: bool) -> dict[str, Any]:
    """Return the shards of an optimizer's state under full names.

    Args:
        module: has its parameters.
        optimizer: the optimizer.
        fresh: leave an optimizer that has not stepped as it is, without a state; else DCP lets it step, with
            gradients and a learning rate of zero.
    """
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415 - see __init__
        get_optimizer_state_dict,
    )

    if not fresh:
        return get_optimizer_state_dict(module, optimizer)
    from torch.distributed import fsdp  # noqa: PLC0415 - see __init__

    kind = fsdp.FullyShardedDataParallel
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP.state_dict_type", FutureWarning)
        with kind.state_dict_type(
            module,
            fsdp.StateDictType.SHARDED_STATE_DICT,
            fsdp.ShardedStateDictConfig(),
            fsdp.ShardedOptimStateDictConfig(),
        ):
            return kind.optim_state_dict(module, optimizer)


def load_flat_optimizer(module: Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `flat_optimizer_state` has returned."""
    from torch.distributed.checkpoint.state_dict import (  # noqa: PLC0415 - see __init__
        set_optimizer_state_dict,
    )

    set_optimizer_state_dict(module, optimizer, state)
