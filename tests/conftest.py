"""What pytest has to know before it imports the tests, and what many of them share."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from copier import Copier
    from object_servers import FaultyProxy, MotoServer

pytest.register_assert_rewrite("asyncckpt.testing.store_contract", "asyncckpt.testing.folder_contract")

with suppress(ImportError):  # which a bare machine with a GPU lacks
    from hypothesis import settings

    settings.register_profile("asyncckpt", deadline=None)  # a busy machine is no failure
    settings.load_profile("asyncckpt")

# Under nohup, or in the background of a script, a process is started with these ignored.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests the time that they need on a busy machine; skip those of a GPU where there is none."""
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("soak")
        if is_long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch  # noqa: PLC0415 - most tests that run alone do without

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(
    params=[pytest.param(1, id="every point", marks=pytest.mark.slow), pytest.param(17, id="some")]
)
def stride(request: pytest.FixtureRequest) -> int:
    """How far apart the points of a call are at which it is interrupted."""
    number: int = request.param
    return number


@pytest.fixture
def memory() -> Iterator[str]:
    """A directory in memory, empty."""
    from fsspec.implementations.memory import MemoryFileSystem  # noqa: PLC0415 - most tests do without

    def clear() -> None:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    clear()
    yield "memory://runs"
    clear()


@pytest.fixture(scope="session")
def moto() -> Iterator[MotoServer]:
    """An S3 server with a bucket; each test has a prefix of its own in it."""
    from object_servers import MotoServer  # noqa: PLC0415 - most tests do without its clients

    with MotoServer() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="session")
def shared_proxy(moto: MotoServer) -> Iterator[FaultyProxy]:
    """The way to that server, which a test can disturb."""
    from object_servers import FaultyProxy  # noqa: PLC0415

    with FaultyProxy(moto.url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultyProxy) -> FaultyProxy:
    """The same, undisturbed at first."""
    shared_proxy.reset()
    return shared_proxy


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copier]:
    """What copies in the background of overlapped saves; nothing of them may be left at the end."""
    from copier import Copier, assert_nothing_is_left  # noqa: PLC0415 - most tests do without torch's optimizers

    copier = Copier()
    monkeypatch.setattr("asyncckpt._snapshot.lanes.memmove", copier)
    yield copier
    copier.open()
    assert_nothing_is_left()
