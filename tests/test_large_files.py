"""Files beyond 4 GiB, laid out in full and never filled: what matters of them is where everything lies."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config as _config

from asyncckpt._checksum import crc32, crc32_combine
from asyncckpt._snapshot.freeze import Freezer
from asyncckpt.layout.description import Description
from asyncckpt.layout.torch_zip import lay_out, plan
from asyncckpt.layout.zip_format import STORAGES
from asyncckpt.layout.zip_reader import read_description, read_directory
from asyncckpt.stores.local import LocalStore
from support import payload_offset

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GIB = 1 << 30
serialization: Any = _config  # patch() is put into it at run time
DESCRIPTION = Description(3, 7, {"loss": 0.5}, 1.0)
LARGE = {
    "one beyond": [100, 5 * GIB, 0, 64],
    "many together": [GIB, GIB, GIB, GIB - 1000, 500, 0, 1, GIB],
    "exactly": [4 * GIB - 1, 4 * GIB - 1, 4 * GIB],
    "just below": [4 * GIB - 2, 1],
}


def crc_of_zeros(size: int) -> int:
    """Return the checksum of that many zeros, by doubling."""
    checksum, power, length = 0, crc32(b"\0"), 1
    while size:
        if size & 1:
            checksum = crc32_combine(checksum, power, length)
        power, length, size = crc32_combine(power, power, length), length * 2, size >> 1
    return checksum


def write_sparse(path: Path, sizes: Sequence[int], data_pickle: bytes) -> None:
    """Carry out a plan whose storages are all zeros, leaving holes for them."""
    made = plan(lay_out(sizes), data_pickle, DESCRIPTION.encode())
    tail = bytearray(made.tail)
    with path.open("wb") as file:
        for offset, literal in made.literals:
            file.seek(offset)
            file.write(literal)
        for slot, key in zip(made.slots.tolist(), made.slot_ranges.tolist(), strict=True):
            checksum = struct.pack("<I", crc_of_zeros(sizes[key]))
            at = slot - made.body.nbytes
            if at >= 0:
                tail[at : at + 4] = checksum
            else:
                file.seek(slot)
                file.write(checksum)
        file.seek(made.body.nbytes)
        file.write(tail)
        assert file.tell() == made.size


def torchs_offsets(sizes: Sequence[int], first: int, path: Path) -> list[int]:
    """Return where torch computes that payloads lie, given the header of the first."""
    reader: Any = torch._C.PyTorchFileReader(str(path))
    offsets, header = [], first
    for key, size in enumerate(sizes):
        offset = reader.get_record_offset_no_read(header, f"data/{key}", size, 64)
        offsets.append(offset)
        descriptor = 0 if not size else 24 if header >= 0xFFFF_FFFF or size >= 0xFFFF_FFFF else 16
        header = offset + size + descriptor
    return offsets


@pytest.fixture(scope="module")
def any_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("any") / "archive.pt"  # whose name its records have
    torch.save({}, path)
    return path


@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
def test_payloads_lie_where_torch_computes(sizes: list[int], any_file: Path) -> None:
    assert lay_out(sizes).starts.tolist() == torchs_offsets(sizes, 0, any_file)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(
            st.integers(0, 300), st.integers(GIB - 100, GIB + 100), st.integers(4 * GIB - 300, 4 * GIB + 10)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_payloads_of_any_sizes_lie_where_torch_computes(sizes: list[int], any_file: Path) -> None:
    body = lay_out(sizes)
    assert body.starts.tolist() == torchs_offsets(sizes, 0, any_file)
    assert (body.stops - body.starts).tolist() == sizes


@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
async def test_every_reader_finds_the_records(sizes: list[int], tmp_path: Path) -> None:
    # All of it is there but the payloads, which are holes: it takes no room and is read in no time.
    state = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    frozen, _ = Freezer().freeze(state)
    path = tmp_path / "large.pt"
    write_sparse(path, sizes, frozen.data_pickle())
    starts = lay_out(sizes).starts.tolist()

    with zipfile.ZipFile(path) as file:
        for key, size in enumerate(sizes):
            info = file.getinfo(f"{STORAGES}{key}")
            assert (info.file_size, info.CRC) == (size, crc_of_zeros(size))
            with file.open(info) as record:
                assert record.read(10) == bytes(min(size, 10))
        assert Description.decode(file.read("archive/.asyncckpt.json")).metrics == DESCRIPTION.metrics

    assert [payload_offset(path, f"data/{key}") for key in range(len(sizes))] == starts
    assert [tensor.shape for tensor in torch.load(path, mmap=True)] == [tensor.shape for tensor in state]
    with serialization.patch("load.calculate_storage_offsets", True):  # noqa: FBT003 - torch's signature
        assert [len(tensor) for tensor in torch.load(path, mmap=True)] == sizes

    store, size = LocalStore(str(tmp_path)), path.stat().st_size
    async with store.open("large.pt") as file:
        described = await file.answer(read_description(size))
        directory = await file.answer(read_directory(size))
    assert described == Description.decode(DESCRIPTION.encode())
    assert directory.starts[: len(sizes)].tolist() == starts
    assert (directory.stops - directory.starts)[: len(sizes)].tolist() == sizes


@pytest.mark.skipif(shutil.which("unzip") is None, reason="there is no unzip here")
def test_unzip_lists_it(tmp_path: Path) -> None:
    sizes = LARGE["one beyond"]
    write_sparse(tmp_path / "large.pt", sizes, b"")
    listed = subprocess.run(
        ["unzip", "-l", "large.pt"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert [int(line.split()[0]) for line in listed.stdout.splitlines() if STORAGES in line] == sizes
    assert not listed.stderr
