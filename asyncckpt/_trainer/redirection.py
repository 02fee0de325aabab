"""Let the sharded saves of a strategy, which write past its CheckpointIO, go through a BackgroundIO."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from asyncckpt._saving.engine import wait_for_pending
from asyncckpt._snapshot.owners import hooked
from asyncckpt._trainer.locations import is_local, locate, step_of
from asyncckpt._trainer.sharded_states import live_optimizer, live_weights, of_fabric, of_trainer
from asyncckpt._trainer.strategies import is_fsdp, is_own, saves_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from asyncckpt._saving.save import Save
    from asyncckpt._saving.saver import Saver
    from asyncckpt._trainer.checkpoint_io import BackgroundIO, Choose
    from asyncckpt._trainer.sharded_states import Divided, Filters


class Redirection:
    """The methods by which a strategy saves and loads, replaced in this one object until `end`.

    Sharded saves are carried out by the BackgroundIO; others, and what Lightning refuses, by the strategy.
    Loads wait for pending saves. The teardown of a Trainer's strategy is that of the BackgroundIO, too.

    Args:
        strategy: `FSDPStrategy` or `ModelParallelStrategy` of a Trainer or of Fabric.
        io: carries out the saves.
    """

    def __init__(self, strategy: Any, io: BackgroundIO) -> None:
        self._strategy = strategy
        self._io = io
        self._fsdp = is_fsdp(strategy)
        self._stock: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}
        if hasattr(strategy, "lightning_module"):
            methods: dict[str, Callable[..., Any]] = {
                "save_checkpoint": self._save_of_trainer,
                "load_checkpoint": self._load,
                "teardown": self._teardown,
            }
            if not self._fsdp:
                # Lightning copies the shards to pageable memory, which takes longer than a snapshot of them.
                live = ("lightning_module_state_dict", self._weights), ("optimizer_state", self._optimizer)
                methods.update(pair for pair in live if is_own(strategy, pair[0]))
        else:
            methods = {"save_checkpoint": self._save_of_fabric, "load_checkpoint": self._load}
        for name, method in methods.items():
            self._stock[name] = getattr(strategy, name)
            self._before[name] = vars(strategy).get(name), method
            setattr(strategy, name, method)

    def end(self) -> None:
        """Give the strategy its methods back, except those that somebody has replaced since; idempotent."""
        before, self._before = self._before, {}
        for name, (former, method) in before.items():
            if vars(self._strategy).get(name) is not method:
                continue
            if former is None:
                delattr(self._strategy, name)
            else:
                setattr(self._strategy, name, former)

    def _save_of_trainer(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        if storage_options is not None or not self._saves_shards():
            self._stock["save_checkpoint"](checkpoint, filepath, storage_options)
            return
        divided = of_trainer(checkpoint, "model" if self._fsdp else "state_dict")
        self._save(divided, filepath)

    def _save_of_fabric(
        self,
        path: str | Path,
        state: Mapping[str, Any],
        storage_options: Any = None,
        filter: Filters | None = None,  # noqa: A002 - Lightning's name
    ) -> None:
        divided = None
        if storage_options is None and self._saves_shards():
            divided = of_fabric(state, filter, fsdp=self._fsdp)
        if divided is None:
            options = {} if storage_options is None else {"storage_options": storage_options}
            self._stock["save_checkpoint"](path=path, state=state, filter=filter, **options)
            return
        self._save(divided, path)

    def _save(self, divided: Divided, path: str | Path) -> None:
        """Save what `divided` has, in the background.

        Raises:
            ValueError: the path is remote.
        """
        began = time.perf_counter()
        path = self._strategy.broadcast(path)  # of the first rank, as Lightning does
        if not is_local(path):
            raise ValueError(
                f"{path} is remote, but Lightning loads sharded checkpoints from local paths only"
            )
        shards, rest = divided
        directory, name = locate(path)

        def start(saver: Saver, choose: Choose) -> Save:
            writer, store = self._io._sharded_writer(saver), self._io._open_store(directory)
            refuse = self._io.submitted.raise_failed_changes
            return writer.save(shards, rest, store, name, step_of(rest), began, choose, refuse)

        self._io._save(path, rest, began, start)

    def _saves_shards(self) -> bool:
        return saves_shards(self._strategy) and not self._io._is_broken_into()

    def _load(self, *args: Any, **kwargs: Any) -> Any:
        wait_for_pending()
        return self._stock["load_checkpoint"](*args, **kwargs)

    def _teardown(self) -> None:
        try:
            self._stock["teardown"]()
        finally:
            if self._before:
                self._io.teardown()

    def _weights(self) -> dict[str, Any]:
        if self._saves_shards():
            return live_weights(self._strategy.model)
        weights: dict[str, Any] = self._stock["lightning_module_state_dict"]()
        return weights

    def _optimizer(self, optimizer: Any) -> dict[str, Any]:
        if self._saves_shards():
            return live_optimizer(self._strategy.model, hooked(optimizer) or optimizer)
        state: dict[str, Any] = self._stock["optimizer_state"](optimizer)
        return state
