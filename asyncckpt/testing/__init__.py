"""Stores that wrap another one, for tests of code that saves, and a contract for a store of your own.

Give a `SlowStore` or `FaultyStore` to `Checkpointer(store=...)` to see what a program does when its disk is
slow or fails. Inherit `asyncckpt.testing.store_contract.StoreContract` to see whether a store keeps what the
interface promises, or `asyncckpt.testing.folder_contract.FolderContract` if it has folders; these are not
imported here because they need pytest.
"""

from __future__ import annotations

from asyncckpt.testing.doubles import FaultyStore, SlowStore, WrapperStore
from asyncckpt.testing.gate import Gate

__all__ = ["FaultyStore", "Gate", "SlowStore", "WrapperStore"]
