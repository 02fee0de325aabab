"""Host memory that the CUDA runtime registers piece by piece, or refuses to."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from asyncckpt._snapshot.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 4096


class Runtime:
    """In place of `torch.cuda.cudart()`: registers memory up to a limit.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}
        self.calls = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        self.calls += 1
        if sum(self.registered.values()) + nbytes > self.limit:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return {2: "out of memory"}[error]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime(3 * PIECE)
    cuda = SimpleNamespace(cudart=lambda: runtime, current_device=lambda: 0, device=nullcontext)
    torch = SimpleNamespace(cuda=cuda, zeros=lambda *_, device: None)  # noqa: ARG005
    monkeypatch.setattr("asyncckpt._snapshot.pinning.torch", torch)
    monkeypatch.setattr("asyncckpt._snapshot.pinning.PIECE", PIECE)
    yield runtime
    assert not runtime.registered


def test_memory_is_registered_in_pieces_and_unregistered_with_the_buffer(runtime: Runtime) -> None:
    arena = Arena()
    lease = arena.lease(3 * PIECE, pinned=True)
    assert runtime.registered == {lease.address + piece * PIECE: PIECE for piece in range(3)}
    lease.release()
    assert arena.lease(3 * PIECE, pinned=True).address == lease.address
    assert runtime.calls == 3
    arena.release()


def test_a_refusal_undoes_what_was_registered_says_what_to_do_and_is_not_asked_for_again(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    arena = Arena()
    for _ in range(2):
        arena.lease(4 * PIECE, pinned=True).release()
        assert not runtime.registered
    assert runtime.calls == 4
    (record,) = caplog.records
    assert "could not be pinned (out of memory" in record.message
    assert "ulimit -l" in record.message
    arena.release()
