"""Files of a remote directory: as its file system lists them, and open for reading."""

# ruff: noqa: D102 - methods without a docstring do what `OpenFile` says

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any

from asyncckpt.stores.base import OpenFile, StoredFile

if TYPE_CHECKING:
    from asyncckpt.stores.base import Store

# What tells one content of a name from the next, by what file systems call it.
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", *_TIMES)


class RemoteFile(OpenFile):
    """An open file of a remote directory."""

    def __init__(self, store: Store, file: StoredFile) -> None:
        self.file = file
        self.path = store.path_of(file.name)
        self._store = store

    async def read(self, offset: int, into: memoryview) -> None:
        await self._store.read(self.file.name, offset, into)


def stored_file(entry: dict[str, Any]) -> StoredFile:
    """Return a file of a listing as stores show it."""
    marks = [str(_number(entry[key])) for key in _VERSIONS if entry.get(key) is not None]
    version = "-".join((f"{entry['size']:x}", *marks))
    return StoredFile(posixpath.basename(entry["name"]), entry["size"], version, modified(entry))


def modified(entry: dict[str, Any]) -> float:
    """Return when a file was written, in seconds since the epoch; 0.0 if its file system does not say."""
    times = (_number(entry.get(key)) for key in _TIMES)
    return next((float(time) for time in times if isinstance(time, (int, float))), 0.0)


def _number(mark: Any) -> Any:
    """Return times as numbers: backends return datetimes or floats."""
    return mark.timestamp() if hasattr(mark, "timestamp") else mark
