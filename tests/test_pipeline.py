"""A plan carried out in pieces of any size, while it fills, is one whole file with true checksums."""

from __future__ import annotations

import io
import threading
import zipfile
import zlib
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt._saving.transfer import Transfer
from asyncckpt._snapshot.copy import Watermark
from asyncckpt.errors import SaveError
from asyncckpt.layout.description import Description
from asyncckpt.layout.torch_zip import lay_out, plan
from asyncckpt.layout.zip_format import STORAGES
from asyncckpt.layout.zip_reader import read_directory
from asyncckpt.stores.local import LocalStore
from asyncckpt.types import SaveStats
from memory_drafts import MemoryDraft, ThreadedDraft

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DESCRIPTION = Description(3, 7, {"loss": 0.5}, 1.0).encode()
sizes_of_storages = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 3000)), max_size=12)


def payload(key: int, size: int) -> bytes:
    return bytes((key * 7 + i * 3 + 1) % 256 for i in range(size))


async def transferred(sizes: Sequence[int], draft: MemoryDraft, *, in_steps: int | None = None) -> bytes:
    """Carry out a plan; `in_steps` lets a copy fill the body meanwhile, that many bytes at a time."""
    body = lay_out(sizes)
    made = plan(body, b"the pickle", DESCRIPTION)
    # What was there before must not matter.
    buffer, mark = memoryview(bytearray(b"\xa5" * (body.nbytes + 100))), Watermark()
    source = bytearray(buffer)
    for key, (start, stop) in enumerate(zip(body.starts.tolist(), body.stops.tolist(), strict=True)):
        source[start:stop] = payload(key, stop - start)

    def fill() -> None:
        step = in_steps or max(body.nbytes, 1)
        for at in range(0, body.nbytes, step):
            # Like the real copy, it may write over what lies between two storages, up to where it stands.
            stop = min(at + step, body.nbytes)
            buffer[at:stop] = source[at:stop]
            mark.advance(stop)
        mark.advance(body.nbytes)

    copying = threading.Thread(target=fill)
    if in_steps is None:
        fill()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Transfer(made, buffer, mark, SaveStats()).into, draft)
        if in_steps is not None:
            copying.start()
    if in_steps is not None:
        copying.join()
    assert len(draft.content()) == made.size
    return draft.content()


def check(content: bytes, sizes: Sequence[int]) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert file.testzip() is None
        for key, size in enumerate(sizes):
            assert file.read(f"{STORAGES}{key}") == payload(key, size)
            checksum = zlib.crc32(payload(key, size))
            assert checksum == file.getinfo(f"{STORAGES}{key}").CRC
            if size:  # behind the payload it is once more, which zipfile does not look at
                stop = int(lay_out(sizes).stops[key])
                assert content[stop : stop + 8] == b"PK\x07\x08" + checksum.to_bytes(4, "little")
        assert file.read("archive/data.pkl") == b"the pickle"
        assert file.infolist()[-1].filename == "archive/.asyncckpt.json"


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of_storages, chunk=st.integers(20, 5000), writers=st.integers(1, 4))
async def test_in_pieces_of_any_size(sizes: list[int], chunk: int, writers: int) -> None:
    check(await transferred(sizes, MemoryDraft(chunk, writers)), sizes)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_of_storages, chunk=st.integers(20, 5000), step=st.integers(50, 3000))
async def test_while_the_copy_fills_it(sizes: list[int], chunk: int, step: int) -> None:
    check(await transferred(sizes, MemoryDraft(chunk, 2), in_steps=step), sizes)


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of_storages, chunk=st.integers(20, 5000), step=st.integers(50, 3000))
async def test_by_several_threads_while_the_copy_fills_it(sizes: list[int], chunk: int, step: int) -> None:
    check(await transferred(sizes, ThreadedDraft(chunk, 4), in_steps=step), sizes)


async def test_a_write_that_fails_ends_the_other_threads() -> None:
    class Full(ThreadedDraft):
        def blocking_writer(self) -> Callable[[int, memoryview], None]:
            def write(offset: int, _: memoryview) -> None:
                if not offset:
                    raise OSError("no space")
                with transfer._advanced:
                    told.append(transfer._advanced.wait_for(lambda: transfer._failed, 10))

            return write

    body, mark = lay_out([300] * 40), Watermark()
    mark.advance(body.nbytes)
    transfer = Transfer(plan(body, b"p", DESCRIPTION), memoryview(bytearray(body.nbytes)), mark, SaveStats())
    told: list[bool] = []
    with pytest.raises(OSError, match="no space"):
        await transfer.into(Full(100, 4))
    assert len(told) <= 3
    assert all(told)


@pytest.mark.parametrize("beyond", range(-20, 21))
async def test_a_checksum_that_lies_across_two_pieces(beyond: int) -> None:
    sizes = [1, 4096 - int(lay_out([1, 1]).starts[1]) + beyond, 5]
    check(await transferred(sizes, MemoryDraft(4096, 1)), sizes)


@settings(max_examples=50, deadline=None)
@given(sizes=sizes_of_storages)
async def test_the_reading_side_finds_every_record_where_it_is(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = await transferred(sizes, MemoryDraft(4096, 1))
    directory = tmp_path_factory.mktemp("run")
    _write(directory / "a.pt", content)
    async with LocalStore(str(directory)).open("a.pt") as file:
        found = await file.answer(read_directory(len(content)))
    assert found.names[: len(sizes)] == tuple(f"{STORAGES}{key}" for key in range(len(sizes)))
    for key, size in enumerate(sizes):
        start, stop = int(found.starts[key]), int(found.stops[key])
        assert content[start:stop] == payload(key, size)
        assert start % 64 == 0
        assert int(found.checksums[key]) == zlib.crc32(payload(key, size))


async def test_a_copy_that_fails_ends_the_transfer() -> None:
    body, mark = lay_out([100, 100]), Watermark()
    transfer = Transfer(plan(body, b"p", DESCRIPTION), memoryview(bytearray(body.nbytes)), mark, SaveStats())
    mark.advance(64)
    mark.end(SaveError("gone"))
    with pytest.raises(SaveError, match="gone"):
        await transfer.into(MemoryDraft(64, 2))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
