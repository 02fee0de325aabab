"""The bare limits: parallel direct writes and reads, in a process that has no torch.

Started as `python bare.py DIRECTORY BYTES`, it takes requests as lines of JSON and answers each with one.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 16 << 20
THREADS = 4
PAGE = mmap.PAGESIZE


def allocate(nbytes: int) -> memoryview:
    """Map page-aligned memory, in huge pages where the system gives them; none of it is touched yet."""
    memory = mmap.mmap(-1, _pages(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def filled(nbytes: int) -> memoryview:
    """Return page-aligned memory that holds random bytes."""
    memory, pattern = allocate(nbytes), os.urandom(CHUNK)
    for start in range(0, len(memory), CHUNK):
        piece = memory[start : start + CHUNK]
        piece[:] = pattern[: len(piece)]
    return memory


def direct_flag(directory: Path) -> int:
    """Return O_DIRECT if files of `directory` can be written so, else 0."""
    if not hasattr(os, "O_DIRECT"):
        return 0
    path = directory / f"direct-{os.getpid()}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)
        try:
            os.pwrite(fd, allocate(PAGE), 0)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
            raise
        return 0
    finally:
        path.unlink(missing_ok=True)
    return os.O_DIRECT


def write(path: str, nbytes: int, data: memoryview, flags: int) -> float:
    """Write a new file, its space reserved beforehand; returns seconds from first write to end of fsync.

    Args:
        path: of the file.
        nbytes: its size; it is rounded up to whole pages.
        data: whole chunks, which are written again and again.
        flags: more of them for the opening.
    """
    size = _pages(nbytes)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        began = time.perf_counter()
        _in_parallel(lambda start, stop: _write_range(fd, data, start, stop), size)
        os.fsync(fd)
        return time.perf_counter() - began
    finally:
        os.close(fd)


def read(path: str, into: memoryview, flags: int) -> float:
    """Read a whole file; returns seconds."""
    began = time.perf_counter()
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        size = os.fstat(fd).st_size
        _in_parallel(lambda start, stop: _read_range(fd, into, start, stop), size)
        return time.perf_counter() - began
    finally:
        os.close(fd)


def _write_range(fd: int, data: memoryview, start: int, stop: int) -> None:
    ahead = start - start % len(data)
    while start < stop:
        start += os.pwrite(fd, data[start - ahead : stop - ahead], start)


def _read_range(fd: int, into: memoryview, start: int, stop: int) -> None:
    while start < stop:
        # Whole pages are asked for: the last of them ends behind the file.
        start += os.preadv(fd, [into[start : _pages(stop)]], start)


def _in_parallel(move: Callable[[int, int], None], size: int) -> None:
    starts = iter(range(0, size, CHUNK))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for start in starts:
                move(start, min(start + CHUNK, size))
        except BaseException as error:  # noqa: BLE001 - raised again by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def main() -> None:
    """Answer requests until the input ends.

    Each has an `action`: "write" a new file from warm memory, "read" one into warm memory, or "read fresh",
    into memory that was never touched. All have `path`, and `nbytes`, the size of the file. The warm memory
    has as many bytes as the command line says, in whole chunks; a file read into it must not be larger.
    """
    flags = direct_flag(Path(sys.argv[1]))
    warm = filled(-(-int(sys.argv[2]) // CHUNK) * CHUNK)
    _answer({"direct": bool(flags)})
    for line in sys.stdin:
        request = json.loads(line)
        action, path, nbytes = request["action"], request["path"], request["nbytes"]
        memory = allocate(nbytes) if action == "read fresh" else warm
        began = time.process_time()
        seconds = write(path, nbytes, memory, flags) if action == "write" else read(path, memory, flags)
        cpu = time.process_time() - began
        del memory
        _answer({"seconds": seconds, "cpu": cpu})


def _answer(values: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
