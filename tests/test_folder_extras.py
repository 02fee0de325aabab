"""Files of a folder that are no data files: their sizes and checksums are in its description."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asyncckpt import Checkpointer, CorruptCheckpointError
from asyncckpt._checksum import crc32
from asyncckpt.layout.description import Description
from asyncckpt.layout.folder_mark import seal
from folders import MARK, save_by_stock

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = b"what a framework keeps beside the state" * 500_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = save_by_stock(tmp_path / "step-00000001", {"n": 1})
    described = Description(
        1, 1, {}, 1.5, {}, "step-{step:08d}.pt", nbytes=1, ranks=1,
        extras={"meta.pt": (len(CONTENT), crc32(CONTENT))},
    )  # fmt: skip
    (path / MARK).write_bytes(seal((path / MARK).read_bytes(), described.encode()))
    (path / "meta.pt").write_bytes(CONTENT)
    return path


def test_a_whole_one_verifies(folder: Path) -> None:
    with Checkpointer(folder.parent) as ckpt:
        ckpt.verify()


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"a", b"", CONTENT[:-5] + b"x" + CONTENT[-4:]])
def test_a_damaged_one_is_named(folder: Path, content: bytes) -> None:
    (folder / "meta.pt").write_bytes(content)
    with Checkpointer(folder.parent) as ckpt, pytest.raises(CorruptCheckpointError, match=r"meta\.pt"):
        ckpt.verify()


def test_a_missing_one_is_named(folder: Path) -> None:
    (folder / "meta.pt").unlink()
    with Checkpointer(folder.parent) as ckpt, pytest.raises(CorruptCheckpointError, match=r"meta\.pt"):
        ckpt.verify()
