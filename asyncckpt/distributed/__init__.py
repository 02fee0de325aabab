"""Counterparts of `torch.distributed.checkpoint.async_save`, `save` and `load`: change the import."""

from asyncckpt.distributed._load import load
from asyncckpt.distributed._save import async_save, save, wait

__all__ = ["async_save", "load", "save", "wait"]
