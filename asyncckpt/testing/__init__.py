"""Stores that wrap another one, for tests of code that saves, and a contract for a store of your own.

Give a `SlowStore` or `FaultyStore` to `Checkpointer(store=...)` to see what a program does when its disk is
slow or fails. Inherit `asyncckpt.testing.store_contract.StoreContract` to see whether a store keeps what the
interface promises; it is not imported here because it needs pytest.
"""

from __future__ import annotations

from asyncckpt.testing.doubles import FaultyStore, Gate, SlowStore, WrapperStore

__all__ = ["FaultyStore", "Gate", "SlowStore", "WrapperStore"]
