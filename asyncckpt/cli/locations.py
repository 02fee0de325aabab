"""From what is typed to stores and files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fsspec.core import split_protocol

from asyncckpt._saving.engine import get_engine
from asyncckpt.errors import CheckpointNotFoundError
from asyncckpt.stores import open_store
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.stores.base import Store, StoredFile

Directory = Annotated[
    str, typer.Argument(metavar="DIR", help="A local path, or a URL such as s3://bucket/run.")
]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the file system behind a URL, as fsspec takes it; JSON, or else text. Repeatable.",
    ),
]

_LOCAL = frozenset({"file", "local"})
_DIRECTORIES = frozenset({"", ".", ".."})


def file_at(path: str, options: Sequence[str] | None) -> tuple[Store, StoredFile]:
    """Return one file.

    Raises:
        CheckpointNotFoundError: there is none.
    """
    protocol, local = split_protocol(path.rstrip("/"))
    directory, slash, name = local.rpartition("/")
    place = directory or slash
    if protocol is not None:
        place = f"{protocol}://{place if protocol in _LOCAL else directory}"
    try:
        if name not in _DIRECTORIES:
            store = store_at(place, options)
            return store, get_engine().call(store.stat, name)
    except FileNotFoundError:
        pass
    raise CheckpointNotFoundError(f"there is no file {path}")


def directory_at(path: str, options: Sequence[str] | None, kind: str = "directory") -> Store:
    """Return the store of a directory that is there; one of a remote store is if it has a file.

    Args:
        path: of the directory.
        options: of its file system.
        kind: what to say that there is none of.

    Raises:
        CheckpointNotFoundError: it is not there.
    """
    store = store_at(path, options)
    if not get_engine().call(store.exists):
        raise CheckpointNotFoundError(f"there is no {kind} {path}")
    return store


def options_for(path: str, among: Sequence[str], options: Sequence[str] | None) -> Sequence[str] | None:
    """Return the options that go with one of several paths: all of them with a URL, none with a local path.

    Where no path is a URL they go with each, so that opening it refuses them.
    """
    return options if is_url(path) or not any(map(is_url, among)) else None


def is_url(path: str) -> bool:
    """Tell whether a path is a URL of a file system that is not local."""
    return split_protocol(path)[0] not in {None, *_LOCAL}


def parsed_options(options: Sequence[str] | None) -> dict[str, Any]:
    """Return what KEY=VALUE mean together.

    Raises:
        typer.BadParameter: one of them is no pair.
    """
    return dict(map(_pair, options or ()))


def links_in(store: Store) -> dict[str, list[str]]:
    """Return the files that symbolic links of the same directory lead to, each with the names of those."""
    links: dict[str, list[str]] = {}
    if isinstance(store, LocalStore):
        directory = Path(os.path.realpath(_local(store, "")))
        for entry in filter(Path.is_symlink, sorted(directory.iterdir())):
            target = Path(os.path.realpath(entry))
            if target.parent == directory:
                links.setdefault(target.name, []).append(entry.name)
    return links


def _local(store: LocalStore, name: str) -> Path:
    return Path(store.path_of(name))


def store_at(directory: str, options: Sequence[str] | None) -> Store:
    """Return the store of a directory, which need not exist.

    Raises:
        StoreError: the URL names a protocol that is not known, or whose package is not installed.
        typer.BadParameter: the options do not go with it.
    """
    try:
        return open_store(directory, parsed_options(options))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--option") from error


def _pair(option: str) -> tuple[str, Any]:
    key, equals, text = option.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="--option")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text
