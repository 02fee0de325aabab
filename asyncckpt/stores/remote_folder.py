"""Folders of a remote directory, where nothing is renamed: the mark alone tells which files are in use.

The files of each attempt have names of their own, so that those of the former one stay until the mark is
replaced. What is about to be made or removed is recorded first, in a temporary file beside the folder: an
`Intent`. It shows other processes that they write to the same directory, and what a crashed writer left.
"""

# ruff: noqa: D102 - methods without a docstring do what `FolderDraft` says

from __future__ import annotations

import errno
import json
import logging
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from anyio import CancelScope

from asyncckpt._threads import for_each
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import FOLDER_MARK, FolderDraft, checked_member
from asyncckpt.stores.errors import remote_errors
from asyncckpt.stores.temporary import intent_name, parse_temporary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncckpt.stores.remote import RemoteStore

logger = logging.getLogger("asyncckpt")

REQUESTS = 16
"""How many small requests are under way at once."""

_ATTEMPT = re.compile(r"[0-9a-f]{16}\.")


@dataclass(frozen=True)
class Intent:
    """What is about to be made in a folder, or removed from it.

    Attributes:
        folder: its name.
        prefixes: how the names of the files begin. They are in use if the mark of the folder holds that.
        given_up: whether the files are being removed.
    """

    folder: str
    prefixes: Sequence[str]
    given_up: bool = False


class RemoteFolderDraft(FolderDraft):
    """A folder draft in a remote directory, of the process that made it."""

    store: RemoteStore

    def __init__(self, directory: RemoteStore, name: str) -> None:
        self.attempt = intent_name(name)
        self.store = directory.folder(name)
        self._directory = directory
        self._prefix = _attempt_prefix(self.attempt)
        self._intent = Intent(name, [self._prefix])
        self._ended = self._may_be_marked = False

    async def open(self) -> None:
        """Record the intent."""
        await self._directory.make_folder(self._intent.folder)
        await _record(self._directory, self.attempt, self._intent)

    def member(self, name: str) -> str:
        return self._prefix + checked_member(name)

    async def commit(self, mark: bytes) -> None:
        name, where = self._intent.folder, self._directory.path_of(self._intent.folder)
        if self._ended:
            message = f"the draft of {name} has ended, by commit or failure; begin a new one"
            raise StoreError(errno.EBADF, message, where)
        self._ended = True
        former = await self.store.read_all(FOLDER_MARK)
        self._may_be_marked = True
        try:
            with remote_errors("writing the mark", where):
                await _write(self.store, FOLDER_MARK, mark)
        except StoreError as error:
            message = f"{error.strerror}; whether {name} is committed is not known: look whether it is listed"
            raise StoreError(error.errno, message, where) from error
        with _failures_logged("removing replaced files", where):
            await _remove_replaced(self._directory, name, former, lambda file: file.startswith(self._prefix))
            await self._directory.remove_files([self.attempt])

    async def drop(self) -> None:
        """Remove what was not committed.

        If the mark could not be written, nothing is: it may be in its place, or come there late. A writer
        that starts after `ABANDONED_AFTER` looks.
        """
        self._ended = True
        if self._may_be_marked:
            return
        with _failures_logged("removing a broken draft", self._directory.path_of(self.attempt)):
            # Recorded first: who joined removes by himself what comes too late to be listed here.
            await _record(self._directory, self.attempt, replace(self._intent, given_up=True))
            await undo(self._directory, self.attempt)


class JoinedRemoteFolder(FolderDraft):
    """A folder draft that another process has made, and will commit or remove."""

    store: RemoteStore

    def __init__(self, directory: RemoteStore, name: str, attempt: str) -> None:
        self.attempt = attempt
        self.store = directory.folder(name)
        self._directory = directory
        self._name = name
        self._prefix = _attempt_prefix(attempt)
        self._members: set[str] = set()

    async def look(self) -> None:
        """Raise StoreError if the draft is not under way here."""
        if not await self._is_under_way():
            raise StoreError(
                errno.ENOENT,
                f"the draft of {self._name} that another process has made is not here: it was removed, or the"
                " storage is not shared by the hosts; use one that is",
                self._directory.path_of(self._name),
            )

    def member(self, name: str) -> str:
        member = self._prefix + checked_member(name)
        self._members.add(member)
        return member

    async def commit(self, mark: bytes) -> None:  # noqa: ARG002 - it is refused
        message = "a folder is committed by the process that made the draft, not by one that joined it"
        raise StoreError(errno.EPERM, message, self._directory.path_of(self._name))

    async def leave(self) -> None:
        """Remove the files made here if the draft was given up, perhaps before they were there."""
        with _failures_logged("looking for a broken draft", self._directory.path_of(self.attempt)):
            if not self._members or await self._is_under_way():
                return
            if self._prefix.encode() not in await self.store.read_all(FOLDER_MARK):
                await self.store.remove_files(self._members)

    async def _is_under_way(self) -> bool:
        intent = await _recorded(self._directory, self.attempt)
        return intent is not None and intent.folder == self._name and not intent.given_up


async def copy_folder(origin: RemoteStore, directory: RemoteStore, name: str) -> None:
    """Copy a committed folder in the store; its files keep their names.

    A folder of that name is replaced at once, unless both have files of the same names, which only others
    than asyncckpt write: then it first ceases to be a committed one.
    """
    target = directory.folder(name)
    before = await origin.stat(FOLDER_MARK)
    mark = await origin.read_all(FOLDER_MARK)
    if origin.path_of("") == target.path_of(""):
        return
    files = [file.name for file in await origin.list() if file.name != FOLDER_MARK]
    # Not those of an attempt under way.
    files = [file for file in files if not _is_of_attempt(file) or _start(file).encode() in mark]
    attempt = intent_name(name)
    await directory.make_folder(name)
    await _record(directory, attempt, _intent_for(name, files))
    try:
        former = await target.read_all(FOLDER_MARK)
        if any(file.encode() in former for file in files if not _is_of_attempt(file)):
            await target.remove_files([FOLDER_MARK])
        await for_each(partial(origin.copy_to, target), files, REQUESTS)
        await _check_version(origin, before.version)
    except BaseException:
        with CancelScope(shield=True), _failures_logged("removing a broken copy", directory.path_of(attempt)):
            await undo(directory, attempt)
        raise
    await _write(target, FOLDER_MARK, mark)
    with _failures_logged("removing replaced files", directory.path_of(name)):
        await _remove_replaced(directory, name, former, files.__contains__)
        await directory.remove_files([attempt])


async def _check_version(folder: RemoteStore, version: str) -> None:
    if (await folder.stat(FOLDER_MARK)).version != version:
        raise FileNotFoundError(errno.ENOENT, "replaced while it was copied", folder.path_of(""))


async def remove_folder(directory: RemoteStore, name: str) -> None:
    """Remove a directory with all that is in it, the mark first."""
    folder = directory.folder(name)
    files = [file.name for file in await folder.list()]
    if FOLDER_MARK not in files:
        await directory.remove_directory(name)
        return
    attempt = intent_name(name)
    await _record(directory, attempt, replace(_intent_for(name, files), given_up=True))
    await folder.remove_files([FOLDER_MARK])
    await directory.remove_directory(name)
    await directory.remove_files([attempt])


async def undo(directory: RemoteStore, attempt: str) -> None:
    """Remove the files that an intent is about, unless the mark of the folder names them; then the intent."""
    intent = await _recorded(directory, attempt)
    if intent is not None:
        folder = directory.folder(intent.folder)
        mark = await folder.read_all(FOLDER_MARK)
        unused = tuple(prefix for prefix in intent.prefixes if prefix.encode() not in mark)
        files = [file.name for file in await folder.list()]
        await folder.remove_files([file for file in files if file.startswith(unused)])
        await directory.remove_empty(intent.folder)
    await directory.remove_files([attempt])


async def _remove_replaced(
    directory: RemoteStore, name: str, former: bytes, keeps: Callable[[str], bool]
) -> None:
    """Remove the files that the former mark of a folder names, and a file of the folder's own name."""
    if former:
        folder = directory.folder(name)
        files = [file.name for file in await folder.list() if file.name.encode() in former]
        await folder.remove_files([file for file in files if not keeps(file) and file != FOLDER_MARK])
    await directory.remove_file_beside(name)


def _intent_for(name: str, files: Sequence[str]) -> Intent:
    return Intent(name, sorted({_start(file) for file in files} - {FOLDER_MARK}))


async def _record(directory: RemoteStore, attempt: str, intent: Intent) -> None:
    await _write(directory, attempt, json.dumps(asdict(intent)).encode())


async def _recorded(directory: RemoteStore, attempt: str) -> Intent | None:
    """Return what was recorded under a name; None if there is no such record."""
    temporary = parse_temporary(attempt)
    if temporary is None or temporary.kind != "folder":
        return None
    recorded = await directory.read_all(attempt)
    return Intent(**json.loads(recorded)) if recorded else None


async def _write(store: RemoteStore, name: str, data: bytes) -> None:
    async with store.draft(name, len(data)) as draft:
        for offset in range(0, len(data), draft.chunk):
            await draft.write(offset, memoryview(data)[offset : offset + draft.chunk])
        await draft.commit()


@contextmanager
def _failures_logged(doing: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what is done then is not undone by it
        logger.warning("%s: %s failed, and is left to a later start: %s", where, doing, error)


def _attempt_prefix(attempt: str) -> str:
    temporary = parse_temporary(attempt)
    return f"{temporary.digits}." if temporary else ""


def _is_of_attempt(file: str) -> bool:
    return _ATTEMPT.match(file) is not None


def _start(file: str) -> str:
    """Return what the names of an attempt begin with; the whole name of any other file."""
    match = _ATTEMPT.match(file)
    return match[0] if match else file
