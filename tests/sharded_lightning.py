"""What trainings with the sharded strategies of Lightning need: strategies for a CPU, a model, observers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.strategies.fsdp import FSDPStrategy as FabricFSDP
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from asyncckpt.testing.doubles import WrapperStore
from trainers import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncckpt.stores import Store

CPU = torch.device("cpu")


class OnCPU(FSDPStrategy):
    """Lightning gives FSDP the index of a device, and a CPU has none."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=CPU, **self.kwargs)


class FabricOnCPU(FabricFSDP):
    def setup_module(self, module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=CPU, **self._fsdp_kwargs)


class Sharded(Model):
    """A model of uneven shards: 7 rows are divided over two ranks, and one more is on one of them only.

    Args:
        strategy: "fsdp" or "model parallel".
        losses: as of `Model`.
        width: of the inner layer.
    """

    def __init__(self, strategy: str, losses: tuple[float, ...] = (1.0,), width: int = 7) -> None:
        super().__init__(losses)
        self.layer = layers(width)  # type: ignore[assignment]
        self.strategy = strategy

    def configure_model(self) -> None:
        if self.strategy == "model parallel" and not hasattr(self, "is_sharded"):
            self.is_sharded = True
            shard(self, self.device_mesh)


def layers(width: int = 7) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))


def shard(module: Any, mesh: Any) -> Any:
    mesh = mesh["data_parallel"]
    for child in module.modules():
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def full_state(model: nn.Module, optimizers: list[Any]) -> dict[str, Any]:
    """Return weights and optimizer state of all ranks, by fully qualified names."""
    options = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=options)
    states = [get_optimizer_state_dict(model, optimizer, options=options) for optimizer in optimizers]
    # What they return may be the live tensors.
    return torch.utils._pytree.tree_map(  # type: ignore[no-any-return]
        lambda value: value.clone() if isinstance(value, torch.Tensor) else value,
        {"weights": weights, "optimizers": states},
    )


class Expected(lightning.Callback):
    """Writes down the state after each batch, or when training starts."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory, self.name = directory, name

    def write(self, trainer: Any, name: str) -> None:
        state = full_state(trainer.strategy.model, trainer.optimizers)
        if trainer.is_global_zero:
            torch.save(state | {"step": trainer.global_step}, f"{self.directory}/{name}")

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.write(trainer, f"{self.name}-start.pt")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.write(trainer, f"{self.name}-{trainer.global_step}.pt")


class Seen(WrapperStore):
    """Notes which checkpoints are there when one is committed or removed."""

    def __init__(self, inner: Store, events: list[Any]) -> None:
        super().__init__(inner)
        self.events = events

    async def before(self, operation: str, subject: str) -> None:
        if operation in {"commit_folder", "remove", "link"}:
            self.events.append([operation, subject, self.names()])

    def names(self) -> list[str]:
        return sorted(path.name for path in Path(self.inner.path_of("")).glob("*.ckpt"))


class Notified(Logger):
    """Notes the checkpoints that it is notified of."""

    name, version = "notified", 0

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.paths.append(Path(checkpoint_callback.best_model_path).name)


class Doing(lightning.Callback):
    """Does something at a hook."""

    def __init__(self, hook: str, func: Callable[[Any], object]) -> None:
        setattr(self, hook, lambda trainer, *_: func(trainer))
