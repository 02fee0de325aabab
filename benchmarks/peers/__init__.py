"""The savers that are compared, asyncckpt among them, each behind the same interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peers.dcp import CachedSaver, ProcessSaver, ThreadSaver
from peers.lightning_io import AsyncCheckpointIO, TorchCheckpointIO
from peers.ours import Function, OneInFlight, Plugin, Reserved, TwoInFlight
from peers.torch_checkpointing_manager import Manager
from peers.torch_save import SyncedTorchSave, TorchSave
from peers.torchsnapshot_async import AsyncTake

if TYPE_CHECKING:
    from peers.base import Peer

# In the order of tables. A peer imports its package when it is started, so that a package which is missing
# or broken is an error of that peer alone.
PEERS: dict[str, type[Peer]] = {
    peer.key: peer
    for peer in (
        TorchSave,
        SyncedTorchSave,
        TorchCheckpointIO,
        AsyncCheckpointIO,
        ThreadSaver,
        ProcessSaver,
        CachedSaver,
        Manager,
        AsyncTake,
        OneInFlight,
        TwoInFlight,
        Function,
        Reserved,
        Plugin,
    )
}
