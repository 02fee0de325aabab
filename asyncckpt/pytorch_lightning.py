"""For the package `pytorch_lightning`: change one import, and every checkpoint is saved in the background."""

from __future__ import annotations

try:
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.callbacks import ModelCheckpoint as _ModelCheckpoint
    from pytorch_lightning.plugins import AsyncCheckpointIO as _AsyncCheckpointIO
    from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
except ImportError as error:
    raise ImportError(
        "asyncckpt.pytorch_lightning needs the package pytorch_lightning: pip install pytorch-lightning. For"
        " the package lightning, import asyncckpt.lightning."
    ) from error

from asyncckpt._trainer.callback import BackgroundCheckpoint, WithLinkBest
from asyncckpt._trainer.checkpoint_io import BackgroundIO
from asyncckpt._trainer.hook_fence import HookFence

__all__ = ["AsyncCheckpointIO", "ModelCheckpoint", "ModelCheckpointWithLinkBest"]


class AsyncCheckpointIO(BackgroundIO, _WrappingCheckpointIO):  # noqa: D101 - its base has it
    __doc__ = BackgroundIO.__doc__
    torch_io = TorchCheckpointIO
    stock_async = _AsyncCheckpointIO


class _HookFence(HookFence, Callback):
    pass


class ModelCheckpoint(BackgroundCheckpoint, _ModelCheckpoint):  # noqa: D101 - its base has it
    __doc__ = BackgroundCheckpoint.__doc__
    trainer_class = Trainer
    io_class = AsyncCheckpointIO
    fence_class = _HookFence


class ModelCheckpointWithLinkBest(WithLinkBest, ModelCheckpoint):  # noqa: D101 - its base has it
    __doc__ = WithLinkBest.__doc__
