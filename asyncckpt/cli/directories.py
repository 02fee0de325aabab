"""Directories below a directory."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from fsspec.core import split_protocol, url_to_fs

from asyncckpt._naming import SUFFIXES
from asyncckpt.cli.formats import is_dcp
from asyncckpt.cli.locations import directory_at, is_url, parsed_options, store_at
from asyncckpt.errors import CheckpointNotFoundError, StoreError
from asyncckpt.stores.errors import remote_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncckpt.stores.base import Store

Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Look into all directories below, too.")]

# A hint is not worth a walk through all of a disk.
_DEPTH = 2
_LOOKED_AT = 1000
_NAMED = 3


def stores_at(
    path: str, options: Sequence[str] | None, *, recursive: bool, kind: str = "directory"
) -> Iterator[Store]:
    """Yield the store of a directory and, if `recursive`, those of all directories below, in order.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        StoreError: one cannot be listed.
    """
    if recursive and is_url(path):
        walked = [store_at(directory, options) for directory, _ in _walk(path, options)]
        if not walked:
            raise CheckpointNotFoundError(f"there is no {kind} {path}")
        yield from walked
        return
    try:
        yield directory_at(path, options, kind)
    except CheckpointNotFoundError:
        # A directory of an object store is there only if it has a file.
        hint = nested_hint(path, options) if is_url(path) else ""
        if not hint:
            raise
        raise CheckpointNotFoundError(f"there is no checkpoint in {path}{hint}") from None
    if recursive:
        for directory, _ in islice(_walk(path, options), 1, None):
            yield store_at(directory, options)


def nested_hint(path: str, options: Sequence[str] | None) -> str:
    """Return that directories not far below hold checkpoints, to be appended to a message; or nothing."""
    found = []
    with suppress(OSError):
        for directory, names in islice(_walk(path, options, _DEPTH), _LOOKED_AT):
            if directory != path and any(
                PurePosixPath(name).suffix in SUFFIXES or is_dcp(name) for name in names
            ):
                found.append(directory)
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f", but in {', '.join(found[:_NAMED])}{more}; --recursive looks there"


def _walk(
    path: str, options: Sequence[str] | None, depth: int | None = None
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield directories and the names of their files, down to `depth` levels below `path`."""
    return _walk_remote(path, options, depth) if is_url(path) else _walk_local(path, depth)


def _walk_local(path: str, depth: int | None) -> Iterator[tuple[str, Sequence[str]]]:
    _, top = split_protocol(path)
    for directory, below, names in os.walk(top, onerror=_refuse):
        yield (path if directory == top else directory), names
        below.sort()
        level = 0 if directory == top else len(PurePosixPath(os.path.relpath(directory, top)).parts)
        if level == depth:
            below.clear()


def _walk_remote(
    url: str, options: Sequence[str] | None, depth: int | None
) -> Iterator[tuple[str, Sequence[str]]]:
    with remote_errors("listing it", url):
        fs, root = url_to_fs(url, **parsed_options(options))
        root = root.rstrip("/")
        levels = None if depth is None else depth + 1
        walked = sorted(fs.walk(root, maxdepth=levels, on_error=_refuse))
    for directory, _, names in walked:
        yield url.rstrip("/") + directory.rstrip("/").removeprefix(root), names


def _refuse(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # it was removed meanwhile
        raise StoreError(error.errno, f"while listing it: {error.strerror}", error.filename) from error
