"""File operations of the local store that are recorded, or fail."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from asyncckpt.stores.fileops import FileOps
from asyncckpt.testing.doubles import Faults

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence


class Call(NamedTuple):
    """One call of a file operation.

    Attributes:
        operation: the name of the method of `FileOps`.
        path: what it was called for. For a descriptor, the path that it was opened with; where there
            are two paths, the target.
    """

    operation: str
    path: str


class RecordingOps(FileOps):
    """Real file operations whose calls are recorded in order, before they are carried out.

    Attributes:
        calls: all calls so far.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def open_paths(self) -> list[str]:
        """The paths of all descriptors that are open now."""
        with self._lock:
            return list(self._paths.values())

    def before(self, operation: str, path: str) -> None:
        """Be told of a call that is about to be made; what this raises is what the call raises."""
        with self._lock:
            self.calls.append(Call(operation, path))

    def _before(self, operation: str, fd: int) -> None:
        self.before(operation, self._paths[fd])

    def _opened(self, fd: int, path: str) -> int:
        with self._lock:
            self._paths[fd] = path
        return fd

    def open(self, path: str, flags: int) -> int:
        """Record, then open."""
        self.before("open", path)
        return self._opened(super().open(path, flags), path)

    def open_direct(self, path: str, flags: int) -> int:
        """Record, then open past the page cache."""
        self.before("open_direct", path)
        return self._opened(super().open_direct(path, flags), path)

    def open_directory(self, path: str) -> int:
        """Record, then open a directory."""
        self.before("open_directory", path)
        return self._opened(super().open_directory(path), path)

    def close(self, fd: int) -> None:
        """Record, then close; the descriptor is closed even if the call is made to fail."""
        try:
            self._before("close", fd)
        finally:
            # Forgotten first: as soon as it is closed its number may be given out again.
            with self._lock:
                del self._paths[fd]
            super().close(fd)

    def flock(self, fd: int) -> None:
        """Record, then lock."""
        self._before("flock", fd)
        super().flock(fd)

    def lockf(self, fd: int) -> None:
        """Record, then take the POSIX lock."""
        self._before("lockf", fd)
        super().lockf(fd)

    def fstatfs(self, fd: int) -> int:
        """Record, then look at the file system."""
        self._before("fstatfs", fd)
        return super().fstatfs(fd)

    def fallocate(self, fd: int, size: int) -> None:
        """Record, then reserve."""
        self._before("fallocate", fd)
        super().fallocate(fd, size)

    def ftruncate(self, fd: int, size: int) -> None:
        """Record, then set the size."""
        self._before("ftruncate", fd)
        super().ftruncate(fd, size)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Record, then write."""
        self._before("pwrite", fd)
        return super().pwrite(fd, data, offset)

    def preadv(self, fd: int, into: memoryview, offset: int) -> int:
        """Record, then read."""
        self._before("preadv", fd)
        return super().preadv(fd, into, offset)

    def fsync(self, fd: int) -> None:
        """Record, then sync."""
        self._before("fsync", fd)
        super().fsync(fd)

    def fsync_directory(self, fd: int) -> None:
        """Record, then sync a directory."""
        self._before("fsync_directory", fd)
        super().fsync_directory(fd)

    def stat(self, path: str) -> os.stat_result:
        """Record, then look."""
        self.before("stat", path)
        return super().stat(path)

    def lstat(self, path: str) -> os.stat_result:
        """Record, then look at the link itself."""
        self.before("lstat", path)
        return super().lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        """Record, then look at what is open."""
        self._before("fstat", fd)
        return super().fstat(fd)

    def scandir(self, path: str) -> Sequence[os.DirEntry[str]]:
        """Record, then list."""
        self.before("scandir", path)
        return super().scandir(path)

    def mkdir(self, path: str) -> None:
        """Record, then make a directory."""
        self.before("mkdir", path)
        super().mkdir(path)

    def link(self, source: str, target: str) -> None:
        """Record, then link."""
        self.before("link", target)
        super().link(source, target)

    def symlink(self, text: str, target: str) -> None:
        """Record, then link symbolically."""
        self.before("symlink", target)
        super().symlink(text, target)

    def replace(self, source: str, target: str) -> None:
        """Record, then replace."""
        self.before("replace", target)
        super().replace(source, target)

    def exchange(self, source: str, target: str) -> None:
        """Record, then exchange."""
        self.before("exchange", target)
        super().exchange(source, target)

    def unlink(self, path: str) -> None:
        """Record, then unlink."""
        self.before("unlink", path)
        super().unlink(path)

    def rmdir(self, path: str) -> None:
        """Record, then remove an empty directory."""
        self.before("rmdir", path)
        super().rmdir(path)

    def rmtree(self, path: str) -> None:
        """Record, then remove a directory."""
        self.before("rmtree", path)
        super().rmtree(path)


class FaultyOps(Faults, RecordingOps):
    """Recorded file operations of which chosen ones fail.

    A `close` that fails does close: the system never leaves a descriptor open then.

    Attributes:
        longest_write: how many bytes one call of `pwrite` takes at most; None for all.
        longest_read: the same of `preadv`.
    """

    def __init__(self, *, longest_write: int | None = None, longest_read: int | None = None) -> None:
        Faults.__init__(self)
        RecordingOps.__init__(self)
        self.longest_write = longest_write
        self.longest_read = longest_read

    def reset(self) -> None:
        """Let everything work again."""
        super().reset()
        self.longest_write = self.longest_read = None

    def before(self, operation: str, path: str) -> None:
        """Record the call, and fail it if it is one that was chosen."""
        super().before(operation, path)
        self.raise_chosen(operation, path)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write no more than `longest_write` bytes."""
        return super().pwrite(fd, data[: self.longest_write], offset)

    def preadv(self, fd: int, into: memoryview, offset: int) -> int:
        """Read no more than `longest_read` bytes."""
        return super().preadv(fd, into[: self.longest_read], offset)
