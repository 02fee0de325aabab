"""Trainings of two ranks with the sharded strategies of Lightning, on the CPU.

As a program it runs some of them one after another, and writes down what each rank finds:
`python lightning_ranks.py DIRECTORY STRATEGY SCENARIO...`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.callbacks import ModelCheckpoint as StockCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from asyncckpt import SaveError
from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.saver import Saver
from asyncckpt.lightning import AsyncCheckpointIO, ModelCheckpoint
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from sharded_lightning import Doing, Expected, FabricOnCPU, Notified, OnCPU, Seen, Sharded, layers, shard
from trainers import StoreIO, delay_copies, is_ours, trainer

if TYPE_CHECKING:
    from asyncckpt.stores import Store


class Run:
    """The scenarios, on one rank."""

    def __init__(self, directory: str, strategy: str, rank: int) -> None:
        self.directory, self.kind, self.rank = directory, strategy, rank

    def path(self, *names: str) -> Path:
        return Path(self.directory, *names)

    def strategy(self, **arguments: Any) -> Any:
        if self.kind == "fsdp":
            return OnCPU(**({"state_dict_type": "sharded", "auto_wrap_policy": {nn.Linear}} | arguments))
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **arguments)

    def fit(
        self, *callbacks: Any, losses: tuple[float, ...] = (1.0,), width: int = 7, **arguments: Any
    ) -> Any:
        """Train; returns the Trainer, with what it raised as its `raised`."""
        fit = {"ckpt_path": arguments.pop("ckpt_path", None)}
        run = trainer(*callbacks, **{"strategy": self.strategy(), "devices": 2, "max_epochs": 2} | arguments)
        run.raised = None
        try:
            run.fit(Sharded(self.kind, losses, width), **fit)
        except (SaveError, ArithmeticError, SystemExit) as error:
            run.raised = f"{type(error).__name__}: {error}"
        return run

    def names(self, *path: str) -> list[str]:
        return sorted(file.name for file in self.path(*path).iterdir())

    def listing(self, run: Any) -> dict[str, Any]:
        """Return what the callback knows, and what there is."""
        callback = run.checkpoint_callback
        scores = {Path(path).name: float(score) for path, score in callback.best_k_models.items()}
        torch.distributed.barrier()
        return {
            "raised": run.raised,
            "best_k_models": scores,
            "best": Path(callback.best_model_path).name,
            "last": Path(callback.last_model_path).name,
            "files": self.names(callback.dirpath),
            "replaced": sorted(
                vars(run.strategy).keys() & {"save_checkpoint", "load_checkpoint", "teardown"}
            ),
            "io": type(run.strategy.checkpoint_io).__name__,
        }

    # The scenarios. Each returns what is the same on both ranks.

    def steps(self) -> Any:
        """Save each step in both classes, and resume from a file of each in the other."""
        for name, kind in (("ours", ModelCheckpoint), ("stock", StockCheckpoint)):
            directory = self.path(name)
            plugins = (
                [StoreIO(lambda store: SlowStore(store, delays={"write": 0.05}))] if name == "ours" else []
            )
            saves = kind(directory, "{step}", every_n_train_steps=1, save_top_k=-1)
            self.fit(Expected(self.directory, name), saves, plugins=plugins)
        resumed = {}
        for source, name, kind in (
            ("ours", "stock-resumed", StockCheckpoint), ("stock", "ours-resumed", ModelCheckpoint),
            ("ours", "ours-again", ModelCheckpoint),
        ):  # fmt: skip
            run = self.fit(
                Expected(self.directory, name), kind(self.path(name)), max_epochs=3,
                ckpt_path=self.path(source, "step=2.ckpt"),
            )  # fmt: skip
            resumed[name] = run.global_step
        return resumed

    def top(self) -> Any:
        """Keep the two best, with links; see what was there at each moment."""
        events: list[Any] = []
        logger = Notified()
        saves = ModelCheckpoint(
            self.path("top"), "{epoch}", "val_loss", save_top_k=2, save_last="link", save_best="link",
            auto_insert_metric_name=False,
        )  # fmt: skip
        plugins = [StoreIO(lambda store: Seen(store, events))]
        run = self.fit(saves, losses=(3.0, 2.0, 1.0), max_epochs=3, logger=logger, plugins=plugins)
        told = self.listing(run)
        tested = trainer(saves, strategy=self.strategy(), devices=2)
        found = tested.validate(Sharded(self.kind), ckpt_path=saves.best_model_path, verbose=False)
        return told | {"events": events, "notified": logger.paths, "validated": found[0]["val_loss"]}

    def kinds(self) -> Any:
        """Copy the newest as the last; save weights only; count versions of pending names."""
        gate = Gate()
        last = ModelCheckpoint(self.path("last"), "{step}", every_n_train_steps=1, save_last=True)
        weights = ModelCheckpoint(
            self.path("weights"), "same", "step", every_n_train_steps=1, save_top_k=-1, save_weights_only=True
        )
        exist: list[bool] = []

        def look(run: Any) -> None:
            paths = [self.path("weights", name) for name in ("same.ckpt", "same-v1.ckpt")]
            exist.extend(weights.file_exists(path, run) for path in paths)
            exist.append(paths[0].exists())
            if run.global_step == 1:
                torch.distributed.barrier()
                gate.open()

        hold = [StoreIO(lambda store: SlowStore(store, gates={"commit_folder": gate}))]
        run = self.fit(Doing("on_train_batch_start", look), weights, plugins=hold, max_epochs=1)
        self.fit(last)
        return {
            "raised": run.raised,
            "exist": exist,
            "weights": self.names("weights"),
            "last": self.names("last"),
        }

    def _failing(self, name: str, epochs: int, operation: str, subject: str, rank: int) -> Any:
        def fail(store: Store) -> Store:
            double = FaultyStore(store)
            if self.rank == rank:
                double.fail(operation, OSError(28, "No space left on device"), where=subject.__eq__)
            return double

        saves = ModelCheckpoint(
            self.path(name), "{epoch}", "val_loss", save_top_k=2, save_last="link",
            auto_insert_metric_name=False,
        )  # fmt: skip
        run = self.fit(saves, losses=(3.0, 2.0, 1.0), max_epochs=epochs, plugins=[StoreIO(fail)])
        return self.listing(run)

    def fails(self) -> Any:
        """Let the disk of the other rank be full at the last save, then that of the first one."""
        return {
            "other": self._failing("other", 2, "commit", "1.ckpt/__1_0.distcp", 1),
            "first": self._failing("first", 2, "commit_folder", "1.ckpt", 0),
        }

    def refused(self) -> Any:
        """Save what cannot be pickled on the first rank, and raise while a save is pending."""

        class Unpicklable(lightning.Callback):
            def on_save_checkpoint(self, *arguments: Any) -> None:
                arguments[-1]["func"] = lambda: None

        def fail(run: Any) -> None:
            if run.global_step == 3:
                raise ArithmeticError("of the user")

        run = self.fit(Unpicklable(), ModelCheckpoint(self.path("refused"), every_n_train_steps=1))
        raised = run.raised
        run = self.fit(
            Doing("on_train_batch_start", fail),
            ModelCheckpoint(
                self.path("raises"), "{step}", every_n_train_steps=2, save_last=True, save_on_exception=True
            ),
            plugins=[StoreIO(lambda store: SlowStore(store, delays={"commit_folder": 0.3}))],
        )
        return {"refused": raised, **self.listing(run)}

    def overlapped(self) -> Any:
        """Let saves be copied during the next batch."""
        started: list[Any] = []

        def note(saver: Any, *arguments: Any, **options: Any) -> Any:
            started.append(start(saver, *arguments, **options))
            return started[-1]

        start = Saver.start
        patch = pytest.MonkeyPatch()
        patch.setattr(Saver, "start", note)
        delay_copies(patch.setattr)
        saves = ModelCheckpoint(
            self.path("overlapped"), "{step}", every_n_train_steps=1, save_top_k=-1, overlap=True
        )
        run = self.fit(Expected(self.directory, "overlapped"), saves, width=30_000)
        patch.undo()
        return {"raised": run.raised, "overlapped": [save.stats.overlapped for save in started]}

    def sigterm(self) -> Any:
        """Get SIGTERM on both ranks while a save is pending."""

        def kill(run: Any) -> None:
            if run.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        run = self.fit(
            Doing("on_train_batch_start", kill),
            ModelCheckpoint(self.path("sigterm"), "{step}", every_n_train_steps=1, save_top_k=-1),
            plugins=[StoreIO(lambda store: SlowStore(store, delays={"commit_folder": 0.3}))],
        )
        return self.listing(run)

    def package(self) -> Any:
        """Use the package `pytorch_lightning`."""
        import pytorch_lightning  # noqa: PLC0415 - one of the scenarios
        from pytorch_lightning.strategies import ModelParallelStrategy as Strategy  # noqa: PLC0415

        from asyncckpt.pytorch_lightning import ModelCheckpoint as Checkpoint  # noqa: PLC0415

        class Other(pytorch_lightning.LightningModule):  # type: ignore[misc] # its types are not looked at
            configure_model = Sharded.configure_model
            training_step = Sharded.training_step
            configure_optimizers = Sharded.configure_optimizers
            train_dataloader = Sharded.train_dataloader

            def __init__(self) -> None:
                super().__init__()
                self.layer, self.strategy = layers(), "model parallel"

        saves = Checkpoint(self.path("package"), "{step}", every_n_train_steps=1)
        strategy = Strategy(data_parallel_size=2, tensor_parallel_size=1)
        run = trainer(saves, package=pytorch_lightning, strategy=strategy, devices=2, max_epochs=1)
        run.fit(Other())
        run.raised = None
        return self.listing(run) | {"wrote": self.wrote("package", "step=2.ckpt")}

    def plugin(self) -> Any:
        """Use the plugin with Lightning's own callback; save before the loop, and before a requeue."""
        io, path = AsyncCheckpointIO(), self.path("plugin")
        run = trainer(
            StockCheckpoint(path, "{step}", every_n_train_steps=1, save_top_k=-1),
            strategy=self.strategy(), devices=2, max_epochs=1, plugins=[io],
        )  # fmt: skip
        io.attach(run)
        io.attach(run)
        run.fit(Sharded(self.kind))
        found: list[bool] = []

        def save(run: Any) -> None:
            name = "hpc_ckpt_1.ckpt" if run.global_step else "before.ckpt"
            run.save_checkpoint(self.path(name))
            found.append(self.path(name, "meta.pt").exists())

        slow = [StoreIO(lambda store: SlowStore(store, delays={"commit_folder": 0.3}))]
        self.fit(
            Doing("on_train_start", save), Doing("on_train_batch_end", save),
            ModelCheckpoint(self.path("then")),
            num_sanity_val_steps=0, max_steps=1, plugins=slow,
        )  # fmt: skip
        return {
            "files": self.names("plugin"),
            "complete": found,
            "wrote": self.wrote("plugin", "step=1.ckpt"),
        }

    def removal(self) -> Any:
        """Let a removal fail on the first rank, with the plugin and Lightning's own callback."""

        def fail(store: Store) -> Store:
            double = FaultyStore(store)
            double.fail("remove", OSError(13, "Permission denied"))
            return double

        io = StoreIO(fail)
        run = trainer(
            Doing("on_train_batch_start", lambda _: get_engine().drain()),
            StockCheckpoint(self.path("removal"), "{step}", every_n_train_steps=1),
            strategy=self.strategy(), devices=2, max_epochs=2, plugins=[io],
        )  # fmt: skip
        io.attach(run)
        try:
            run.fit(Sharded(self.kind))
        except SaveError as error:
            return {"raised": f"{type(error).__name__}: {error}", "step": run.global_step}

    def killed(self) -> Any:
        """Kill the other rank while its part is written; the program ends with this scenario."""

        def kill(run: Any) -> None:
            if run.global_step == 1 and self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        delays = {"commit": 10.0} if self.rank == 1 else {}
        saves = ModelCheckpoint(self.path("killed"), "{step}", every_n_train_steps=1)
        plugins = [StoreIO(lambda store: SlowStore(store, delays=delays), rank_timeout=2.0)]
        with pytest.raises(RuntimeError) as raised:
            self.fit(Doing("on_train_batch_start", kill), saves, plugins=plugins)
        notes = getattr(raised.value, "__notes__", [])  # from Python 3.11 on
        told = {"notes": notes, "files": self.names("killed"), "best": saves.best_model_path}
        Path(self.directory, "killed-0.json").write_text(json.dumps(told))
        os._exit(0)  # gloo waits for the other rank

    def wrote(self, *path: str) -> str:
        """Return who wrote a checkpoint."""
        torch.distributed.barrier()
        mark = Path(self.path(*path, ".metadata")).read_bytes()
        return "asyncckpt" if mark.rpartition(b".")[0] and b'"sequence"' in mark else "torch"

    def others(self) -> Any:
        """Save full states, and with a strategy whose save is a user's."""
        every = {"every_n_train_steps": 1}
        told = {}
        if self.kind != "fsdp":  # which crashes torch on a CPU
            run = self.fit(
                ModelCheckpoint(self.path("full"), "{step}", **every),  # type: ignore[arg-type]
                strategy=self.strategy(save_distributed_checkpoint=False),
            )
            told = self.listing(run) | {"ours": is_ours(Path(self.path("full", "step=4.ckpt")))}
        calls = []
        base: Any = type(self.strategy())

        class Users(base):  # type: ignore[misc]
            def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
                calls.append(Path(filepath).name)
                super().save_checkpoint(checkpoint, filepath, storage_options)

        users = self.strategy()
        users.__class__ = Users
        self.fit(ModelCheckpoint(self.path("users"), "{step}", **every), strategy=users, max_epochs=1)  # type: ignore[arg-type]
        wrote = self.wrote("users", "step=2.ckpt")
        return told | {"calls": calls, "wrote": wrote}

    def fabric(self) -> Any:
        """Save with Fabric, in the background and by Lightning itself, and load by Lightning."""
        if self.kind == "fsdp":
            strategy: Any = FabricOnCPU(state_dict_type="sharded", auto_wrap_policy={nn.Linear})
        else:
            strategy = FabricModelParallel(shard, data_parallel_size=2, tensor_parallel_size=1)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()

        def objects() -> dict[str, Any]:
            model = fabric.setup_module(layers())
            opt: Any = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=0.1))
            return {
                "model": model,
                "opt": opt,
                "seen": [1, "two"],
                "rate": torch.optim.lr_scheduler.StepLR(opt, 2),
            }

        state = objects()
        fabric.backward(state["model"](torch.ones(2, 4)).sum())
        state["opt"].step()
        fabric.save(self.path("fabric-stock"), state)
        refused = []
        with StoreIO(lambda store: SlowStore(store, delays={"commit_folder": 0.3})) as io:
            io.attach(fabric)
            fabric.save(self.path("fabric"), state)
            state["opt"].step()
            loaded = objects()
            loaded["seen"] = None
            fabric.load(self.path("fabric"), loaded)  # waits
            fabric.save(self.path("fabric-loaded"), loaded)
            model = state["model"]
            bad_states: list[dict[str, Any]] = [{"seen": 1}, {"model": model, "twin": model}]
            for bad in bad_states:
                try:
                    fabric.save(self.path("fabric-bad"), bad)
                except ValueError as error:
                    refused.append(str(error).partition(".")[0])
            if self.kind != "fsdp":
                weights = {"model": lambda name, _: name.endswith("weight")}
                fabric.save(self.path("fabric-part"), state, filter=weights)
        return {
            "seen": loaded["seen"],
            "refused": refused,
            "replaced": sorted(vars(strategy).keys() & {"save_checkpoint", "load_checkpoint"}),
            "wrote": [self.wrote(name) for name in ("fabric-stock", "fabric", "fabric-loaded")],
        }


def main(directory: str, strategy: str, *scenarios: str) -> None:
    """Run scenarios as this rank, of which there are two after the fork."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    child = os.fork()
    rank = 0 if child else 1
    os.environ.update(
        TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GROUP_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run = Run(directory, strategy, rank)
    for scenario in scenarios:
        faulthandler.dump_traceback_later(100, exit=True)
        told = getattr(run, scenario)()
        Path(directory, f"{scenario}-{rank}.json").write_text(json.dumps(told))
        torch.distributed.barrier()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
