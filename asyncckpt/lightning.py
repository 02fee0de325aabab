"""For the package `lightning`: change one import, and every checkpoint is saved in the background."""

from __future__ import annotations

try:
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.callbacks import ModelCheckpoint as _ModelCheckpoint
    from lightning.pytorch.plugins import AsyncCheckpointIO as _AsyncCheckpointIO
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
except ImportError as error:
    raise ImportError(
        'asyncckpt.lightning needs the package lightning: pip install "lightning>=2.6". For'
        " pytorch_lightning, import asyncckpt.pytorch_lightning."
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
