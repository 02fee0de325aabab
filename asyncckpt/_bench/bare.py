"""The limit of a disk: parallel direct writes, without torch."""

from __future__ import annotations

import errno
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNK = 16 << 20
THREADS = 4


def allocate(nbytes: int) -> memoryview:
    """Map page-aligned memory, in huge pages where the system gives them; none of it is touched yet."""
    memory = mmap.mmap(-1, whole_pages(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def filled(nbytes: int) -> memoryview:
    """Return page-aligned memory that holds random bytes, at least `nbytes` and in whole chunks."""
    memory, pattern = allocate(-(-nbytes // CHUNK) * CHUNK), os.urandom(CHUNK)
    for start in range(0, len(memory), CHUNK):
        memory[start : start + CHUNK] = pattern
    return memory


def direct_flag(directory: Path) -> int:
    """Return O_DIRECT if files of `directory` can be written so, else 0."""
    flag: int = getattr(os, "O_DIRECT", 0)
    path = directory / f"direct-{os.getpid()}"
    try:
        write(path, mmap.PAGESIZE, allocate(mmap.PAGESIZE), flag)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        return 0
    finally:
        path.unlink(missing_ok=True)
    return flag


def write(path: Path, nbytes: int, data: memoryview, flags: int) -> float:
    """Write a new file, its space reserved beforehand; returns seconds from first write to end of fsync.

    Args:
        path: of the file.
        nbytes: its size, rounded up to whole pages.
        data: whole pages, which are written again and again.
        flags: more of them for the opening.
    """
    size = whole_pages(nbytes)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o666)

    def write_range(start: int, stop: int) -> None:
        ahead = start - start % len(data)
        while start < stop:
            start += os.pwrite(fd, data[start - ahead : stop - ahead], start)

    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        began = time.perf_counter()
        in_parallel(write_range, size)
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)


def in_parallel(move: Callable[[int, int], None], size: int) -> None:
    """Call `move` for the start and the stop of each chunk of `size` bytes, from several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(move, at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]:
            done.result()


def whole_pages(nbytes: int) -> int:
    """Return a size rounded up to whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
