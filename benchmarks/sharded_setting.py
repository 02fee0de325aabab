"""What the measurements of one rank share: equal conditions, the peers, and the limits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

import sharded_model
from peers.ranks import state_for

if TYPE_CHECKING:
    from collections import defaultdict
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from harness import Options
    from peers.base import Peer
    from sharded_model import RankTraining

    Samples = defaultdict[str, list[Any]]

WARMING = 2  # turns before the measured ones


class Started(NamedTuple):
    """A peer, and the state that it saves."""

    peer: Peer
    state: dict[str, Any]


class Setting(NamedTuple):
    """How this rank measures.

    Attributes:
        options: where to write and how often to save.
        group: for barriers of the benchmark.
        keys: of the peers to measure.
    """

    options: Options
    group: Any
    keys: Sequence[str]

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return dist.get_rank() == 0

    @property
    def bare_path(self) -> Path:
        """The file for bare writes of this rank."""
        return self.options.directory / f"bare-{dist.get_rank()}"

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.group)

    def settle(self) -> None:
        """Let the disk come to rest, and let all ranks begin together."""
        self.options.synchronize()
        self.barrier()
        if self.leads:
            self.options.settle()
        self.barrier()

    def remove(self, peer: Peer, name: str) -> None:
        """Delete a checkpoint that all ranks have completed."""
        self.barrier()
        if self.leads:
            peer.remove(name)
        self.barrier()

    def training(self, kind: str = "fsdp") -> RankTraining:
        """Make the model and the optimizer that are saved."""
        return sharded_model.training(kind, self.options.device, quick=self.options.quick)

    @contextmanager
    def started(self, classes: Mapping[str, type[Peer]], live: RankTraining) -> Iterator[dict[str, Started]]:
        """Have the chosen peers ready to save a training."""
        found = {}
        for key, peer_class in classes.items():
            if key in self.keys:
                peer = peer_class(self.options.directory)
                state = state_for(peer, live.model, live.optimizer)
                peer.start(state)
                found[key] = Started(peer, state)
        yield found
        # Not after an error: the other ranks would not come.
        for peer, _ in found.values():
            self.barrier()
            peer.close()
