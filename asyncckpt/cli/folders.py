"""Read folders of many ranks within the limits that hold for all that the shell reads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from asyncckpt._inspection.isolation import look_at
from asyncckpt._loading.folder import replaced_error, with_folder
from asyncckpt._loading.reader import ATTEMPTS
from asyncckpt._loading.source import has_folder
from asyncckpt._threads import in_thread
from asyncckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.layout.folder_mark import unseal
from asyncckpt.stores.base import FOLDER_MARK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt._loading.folder import Folder
    from asyncckpt.stores.base import Store

R = TypeVar("R")


async def read_folder(read: Callable[[Folder], Awaitable[R]], store: Store, name: str) -> R:
    """Open a folder for `read`, again if it is replaced meanwhile.

    Its metadata are first unpickled in the child process: hostile ones could keep this one busy forever.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CorruptCheckpointError: it is damaged, or its metadata take too much memory or time.
        UnsafeStateError: its metadata name what those of DCP do not have.
        StoreError: it could not be read.
    """
    await _check_metadata(store, name)
    return await with_folder(read, store, name)


async def _check_metadata(store: Store, name: str) -> None:
    path = store.path_of(name)
    for _ in range(ATTEMPTS):
        try:
            async with store.folder(name).open(FOLDER_MARK) as mark:
                data = bytearray(mark.file.nbytes)
                await mark.read(0, memoryview(data))
            pickled = unseal(bytes(data))
        except FileNotFoundError as error:
            if not await has_folder(store, name):
                raise CheckpointNotFoundError(f"there is no checkpoint {path}") from error
            continue  # it was replaced meanwhile
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{path}: {error}") from error
        await in_thread(partial(look_at, "nothing", [(path, pickled)], record=FOLDER_MARK))
        return
    raise replaced_error(path)
