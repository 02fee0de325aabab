"""Open stores and files by the paths and URLs of the command line, and find directories below."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer
from anyio.from_thread import start_blocking_portal
from fsspec.core import split_protocol, url_to_fs

from asyncckpt._naming import SUFFIXES
from asyncckpt.cli.formats import INCOMPLETE, has_data_files
from asyncckpt.errors import CheckpointNotFoundError, StoreError
from asyncckpt.stores import open_store
from asyncckpt.stores.base import FOLDER_MARK, Store, StoredFile
from asyncckpt.stores.errors import remote_errors
from asyncckpt.stores.temporary import is_temporary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

T = TypeVar("T")

Directory = Annotated[
    str, typer.Argument(metavar="DIR", help="A local path, or a URL such as s3://bucket/run.")
]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="Option of the file system of a URL, as fsspec takes it: JSON, or else text. Repeatable.",
    ),
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Include all directories below.")]

_LOCAL = frozenset({"file", "local"})
_DOTS = frozenset({".", ".."})
# A hint searches a part of the tree only.
_DEPTH = 3
_LOOKED_AT = 1000
_NAMED = 3


def call(func: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run an async function and wait for its result; Ctrl-C cancels it.

    The event loop runs in another thread, since one in the main thread can miss the signal.
    """
    with start_blocking_portal() as portal:
        return portal.call(func, *args)


def store_at(directory: str, options: Sequence[str] | None) -> Store:
    """Return the store of a directory, which need not exist.

    Raises:
        StoreError: the protocol of the URL is unknown, or its package is not installed.
        typer.BadParameter: the options do not fit it.
    """
    try:
        return open_store(directory, parsed_options(options))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--option") from error


class Found(NamedTuple):
    """A file, or a folder with the files of many ranks.

    Attributes:
        store: of its directory.
        file: as the store lists it.
        is_folder: whether it is a folder.
    """

    store: Store
    file: StoredFile
    is_folder: bool


def checkpoint_at(path: str, options: Sequence[str] | None) -> Found:
    """Return the file or the folder of a path.

    Raises:
        CheckpointNotFoundError: there is neither; the message tells of a folder that is incomplete.
    """
    directory, name = _split(path)
    if name:
        store = store_at(directory, options)
        with suppress(FileNotFoundError):
            return Found(store, call(store.stat, name), is_folder=False)
        with suppress(FileNotFoundError):
            mark = call(store.folder(name).stat, FOLDER_MARK)
            return Found(store, replace(mark, name=name), is_folder=True)
        if has_data_files(call(store.folder(name).list)):
            raise CheckpointNotFoundError(f"{path} is {INCOMPLETE}")
    raise CheckpointNotFoundError(f"there is no file or sharded checkpoint {path}")


def file_at(path: str, options: Sequence[str] | None) -> tuple[Store, StoredFile]:
    """Return a file and the store of its directory; raises CheckpointNotFoundError if there is none."""
    directory, name = _split(path)
    if name:
        store = store_at(directory, options)
        with suppress(FileNotFoundError):
            return store, call(store.stat, name)
    raise CheckpointNotFoundError(f"there is no file {path}")


def _split(path: str) -> tuple[str, str]:
    """Return the directory of a path, and its last name; none for the root of a file system."""
    protocol, local = split_protocol(path.rstrip("/"))
    if is_url(path):
        directory, _, name = local.rpartition("/")
        return f"{protocol}://{directory}", name
    if local.rpartition("/")[2] in _DOTS:
        local = str(Path(local).resolve())
    directory, slash, name = local.rpartition("/")
    return directory or slash, name


def directory_at(path: str, options: Sequence[str] | None) -> Store:
    """Return the store of a directory that exists; raises CheckpointNotFoundError if it does not."""
    return next(stores_at(path, options))


def stores_at(
    path: str, options: Sequence[str] | None, *, recursive: bool = False, kind: str = "directory"
) -> Iterator[Store]:
    """Yield the store of a directory and, if `recursive`, those of all directories below, in order.

    Raises:
        CheckpointNotFoundError: there is no such directory, called a `kind` in the message.
        StoreError: one cannot be listed.
    """
    store = store_at(path, options)
    exists = call(store.exists)
    if recursive and (exists or is_url(path)):  # a directory of an object store exists only if it has a file
        for directory, names in _walk(path, options):
            exists = True
            if directory == path or FOLDER_MARK not in names:  # its parent has it as one checkpoint
                yield store_at(directory, options)
    elif exists:
        yield store
    if not exists:
        hint = nested_hint(path, options) if is_url(path) and not recursive else ""
        raise CheckpointNotFoundError(f"there is no {'checkpoint in' if hint else kind} {path}{hint}")


def nested_hint(path: str, options: Sequence[str] | None) -> str:
    """Return the directories below that hold checkpoints, as the end of a message; empty if none does."""
    found: list[str] = []
    with suppress(OSError):
        for directory, names in _walk(path, options, _DEPTH):
            is_folder = FOLDER_MARK in names
            place = directory.rpartition("/")[0] if is_folder else directory
            is_checkpoint = is_folder or any(PurePosixPath(name).suffix in SUFFIXES for name in names)
            if directory != path and is_checkpoint and place not in {path, *found}:
                found.append(place)
    if not found:
        return ""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"; there are some in {', '.join(found[:_NAMED])}{more} (use --recursive)"


def options_for(path: str, among: Sequence[str], options: Sequence[str] | None) -> Sequence[str] | None:
    """Return the options for one of several paths: all for a URL, none for a local path.

    If no path is a URL, each gets all of them, so that opening it refuses them.
    """
    return options if is_url(path) or not any(map(is_url, among)) else None


def is_url(path: str) -> bool:
    """Return whether a path is a URL of a file system that is not local."""
    return split_protocol(path)[0] not in {None, *_LOCAL}


def parsed_options(options: Sequence[str] | None) -> dict[str, Any]:
    """Return KEY=VALUE options as a dict; raise typer.BadParameter if one is not a pair."""
    parsed = {}
    for option in options or ():
        key, equals, text = option.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="--option")
        parsed[key] = text
        with suppress(ValueError):
            parsed[key] = json.loads(text)
    return parsed


def _walk(
    path: str, options: Sequence[str] | None, depth: int | None = None
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield directories and the names of their files, `depth` levels; raise the first error at the end."""
    errors: list[OSError] = []
    with remote_errors("listing it", path):
        fs, root = url_to_fs(path, **parsed_options(options))
        root = root.rstrip("/")
        walked = fs.walk(root or "/", maxdepth=depth, on_error=errors.append)
        found = sorted(islice(walked, _LOOKED_AT if depth else None), key=lambda entry: entry[0].split("/"))
    for directory, _, names in found:
        below = directory.rstrip("/").removeprefix(root)
        if any(map(is_temporary, below.split("/"))):  # a draft
            continue
        yield (path.rstrip("/") + below if below else path), names
    for error in errors:
        if not isinstance(error, FileNotFoundError):  # it was removed meanwhile
            raise StoreError(error.errno, f"while listing it: {error.strerror}", error.filename) from error
