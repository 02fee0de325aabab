from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from anyio.lowlevel import checkpoint

from asyncckpt.errors import StoreError
from asyncckpt.stores.local import LocalStore
from asyncckpt.testing import FaultyStore, Gate, SlowStore
from asyncckpt.testing.folder_contract import FolderContract, folder_names, put_folder
from asyncckpt.testing.store_contract import get, names, put, write_all
from file_operations import Call, FaultyOps, RecordingOps

if TYPE_CHECKING:
    from pathlib import Path

    from asyncckpt.stores.base import Store

OPERATIONS = ("prepare", "draft", "write", "commit", "list", "stat", "read", "remove", "copy", "link")


FOLDER_OPERATIONS = ("list_folders", "folder_draft", "join_folder", "commit_folder")


async def call(store: Store, operation: str) -> None:
    """Call an operation of a store that holds a.pt."""
    match operation:
        case "list_folders":
            await store.list_folders()
        case "folder_draft" | "commit_folder":
            await put_folder(store, "folder", {"file": b"two"})
        case "join_folder":
            async with store.folder_draft("folder") as draft, store.join_folder("folder", draft.attempt):
                pass
        case "prepare":
            await store.prepare()
        case "draft" | "write" | "commit":
            await put(store, "b.pt", b"two")
        case "list":
            await store.list()
        case "stat":
            await store.stat("a.pt")
        case "read":
            await store.read("a.pt", 0, memoryview(bytearray(3)))
        case "remove":
            await store.remove("b.pt")
        case _:
            await getattr(store, operation)("a.pt", "b.pt")


@pytest.fixture
async def inner(tmp_path: Path) -> LocalStore:
    store = LocalStore(str(tmp_path))
    await put(store, "a.pt", b"one")
    return store


class TestSlowStoreContract(FolderContract):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self._directory = tmp_path / "runs"

    def make_store(self) -> SlowStore:
        gate = Gate(opened=True)
        return SlowStore(
            LocalStore(str(self._directory)),
            gates=dict.fromkeys(OPERATIONS + FOLDER_OPERATIONS, gate),
            delays=dict.fromkeys(OPERATIONS + FOLDER_OPERATIONS, 0),
        )


class TestFaultyStoreContract(FolderContract):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path) -> None:
        self._directory = tmp_path / "runs"

    def make_store(self) -> FaultyStore:
        return FaultyStore(LocalStore(str(self._directory)))


class TestSlowStore:
    @pytest.mark.parametrize("operation", OPERATIONS + FOLDER_OPERATIONS)
    async def test_an_operation_waits_at_its_gate(self, inner: LocalStore, operation: str) -> None:
        gate = Gate()
        ended = anyio.Event()

        async def work() -> None:
            await call(SlowStore(inner, gates={operation: gate}), operation)
            ended.set()

        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await gate.arrival()
            await anyio.wait_all_tasks_blocked()
            assert not ended.is_set()
            gate.open()
            await ended.wait()
        assert gate.arrived == 1

    async def test_a_held_commit_shows_nothing(self, inner: LocalStore) -> None:
        gate = Gate()
        async with anyio.create_task_group() as group:
            group.start_soon(put, SlowStore(inner, gates={"commit": gate}), "b.pt", b"two")
            await gate.arrival()
            assert await names(inner) == ["a.pt"]
            gate.open()
        assert await names(inner) == ["a.pt", "b.pt"]

    async def test_delays_are_slept_with_the_given_clock(self, inner: LocalStore) -> None:
        slept = []

        async def sleep(seconds: float) -> None:
            await checkpoint()
            slept.append(seconds)

        store = SlowStore(inner, delays={"write": 5, "commit": 60}, sleep=sleep)
        await put(store, "b.pt", b"two")
        await store.stat("b.pt")
        assert slept == [5, 60]

    async def test_waiting_can_be_cancelled(self, inner: LocalStore, tmp_path: Path) -> None:
        gate = Gate()
        async with anyio.create_task_group() as group:
            group.start_soon(put, SlowStore(inner, gates={"write": gate}), "b.pt", b"two")
            await gate.arrival()
            group.cancel_scope.cancel()
        gate.open()
        assert [entry.name for entry in os.scandir(tmp_path)] == ["a.pt"]

    def test_it_says_what_it_wraps(self) -> None:
        assert repr(SlowStore(LocalStore("runs"))) == "SlowStore(LocalStore('runs'))"


class TestGate:
    def test_it_holds_work_of_another_thread(self, tmp_path: Path) -> None:
        gate = Gate()
        store = SlowStore(LocalStore(str(tmp_path)), gates={"commit": gate})
        with start_blocking_portal() as portal:
            future = portal.start_task_soon(put, store, "a.pt", b"one")
            gate.wait_for_arrival()
            assert not future.done()
            assert "closed, 1 arrived, 1 waiting" in repr(gate)
            gate.open()
            future.result(30)
            assert "open, 1 arrived, 0 waiting" in repr(gate)
        assert (tmp_path / "a.pt").read_bytes() == b"one"

    async def test_it_can_be_closed_again(self) -> None:
        gate = Gate(opened=True)
        await gate.passing()
        gate.close()
        async with anyio.create_task_group() as group:
            group.start_soon(gate.passing)
            group.start_soon(gate.passing)
            await gate.arrival(3)
            gate.open()

    def test_waiting_for_what_does_not_come_ends(self) -> None:
        with pytest.raises(TimeoutError, match="0 of 1 operations"):
            Gate().wait_for_arrival(timeout=0)


class TestFaultyStore:
    @pytest.mark.parametrize("operation", OPERATIONS + FOLDER_OPERATIONS)
    async def test_a_chosen_operation_fails_once_and_does_nothing(
        self, inner: LocalStore, operation: str
    ) -> None:
        store = FaultyStore(inner)
        error = StoreError(errno.EIO, "chosen")
        store.fail(operation, error)
        with pytest.raises(StoreError) as caught:
            await call(store, operation)
        assert caught.value is error
        assert await names(inner) == ["a.pt"]
        assert await folder_names(inner) == []
        await call(store, operation)
        assert store.calls[operation] == 2

    async def test_the_call_can_be_chosen_by_number_and_name(self, inner: LocalStore) -> None:
        store = FaultyStore(inner)
        store.fail(
            "remove", StoreError(errno.EIO, "chosen"), at=2, times=2, where=lambda name: name == "b.pt"
        )
        for name in ("b.pt", "c.pt"):
            await store.remove(name)
        for name in ("b.pt", "b.pt"):
            await store.remove("c.pt")
            with pytest.raises(StoreError):
                await store.remove(name)
        await store.remove("b.pt")

    async def test_files_of_folders_are_named_with_their_folder(self, inner: LocalStore) -> None:
        store = FaultyStore(inner)
        for operation in ("write", "commit", "stat"):
            store.fail(operation, StoreError(errno.EIO, operation), where=lambda name: name == "a/file")
        for operation in ("write", "commit"):
            with pytest.raises(StoreError, match=operation):
                await put_folder(store, "a", {"file": b"two"})
        assert await folder_names(inner) == []
        await put_folder(store, "a", {"file": b"two"})
        with pytest.raises(StoreError, match="stat"):
            await get(store.folder("a"), "file")
        async with store.folder_draft("a") as draft, store.join_folder("a", draft.attempt) as joined:
            store.fail("draft", StoreError(errno.EIO, "joined"), where=lambda name: name == "a/more")
            with pytest.raises(StoreError, match="joined"):
                await put(joined.store, joined.member("more"), b"one")

    async def test_it_can_fail_for_good_and_be_reset(self, inner: LocalStore) -> None:
        store = FaultyStore(inner)
        store.fail("commit", StoreError(errno.EIO, "chosen"), times=None)
        for _ in range(3):
            with pytest.raises(StoreError):
                await put(store, "b.pt", b"two")
        store.reset()
        await put(store, "b.pt", b"two")
        assert await get(inner, "b.pt") == b"two"
        assert store.calls["commit"] == 1


class TestOps:
    async def test_calls_are_recorded_with_the_path_of_their_descriptor(self, tmp_path: Path) -> None:
        ops = RecordingOps()
        store = LocalStore(str(tmp_path), ops)
        async with store.draft("a.pt", 3) as draft:
            await write_all(draft, b"one")
            (temporary,) = (entry.path for entry in os.scandir(tmp_path))
            assert ops.calls[-1] == Call("pwrite", temporary)
            assert set(ops.open_paths) == {temporary}
        assert ops.calls[-1] == Call("close", temporary)
        assert ops.open_paths == []

    async def test_faults_can_be_chosen_and_reset(self, tmp_path: Path) -> None:
        ops = FaultyOps(longest_write=1, longest_read=1)
        store = LocalStore(str(tmp_path), ops)
        await put(store, "a.pt", b"one")
        assert await get(store, "a.pt") == b"one"
        assert [call.operation for call in ops.calls].count("pwrite") == 3
        ops.reset()
        ops.calls.clear()
        ops.fail("fsync", OSError(errno.EIO, "Input/output error"), times=None)
        ops.reset()
        await put(store, "a.pt", b"two")
        assert [call.operation for call in ops.calls].count("pwrite") == 1


def test_the_doubles_do_not_need_pytest() -> None:
    script = "import sys, asyncckpt.testing; sys.exit('pytest' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
