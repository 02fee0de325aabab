"""Doubles and a contract for tests of code that saves, and of stores of one's own.

`SlowStore` and `FaultyStore` wrap any store, `RecordingOps` and `FaultyOps` watch and disturb the
local one. A store proves itself by inheriting `asyncckpt.testing.store_contract.StoreContract`,
which is not imported here because it needs pytest.
"""

from __future__ import annotations

from asyncckpt.testing.doubles import FaultyStore, Gate, SlowStore
from asyncckpt.testing.ops import Call, FaultyOps, RecordingOps

__all__ = ["Call", "FaultyOps", "FaultyStore", "Gate", "RecordingOps", "SlowStore"]
