"""File operations that are queued behind pending saves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from asyncckpt._saving.engine import Operation, get_engine
from asyncckpt._saving.save import Outcome
from asyncckpt._threads import in_thread
from asyncckpt.errors import SaveSkipped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

    # Earlier saves and operations: if one has failed, the operation is skipped.
    Causes = Sequence[Outcome[Checkpoint] | Outcome[None]]


def remove(store: Store, name: str, *, causes: Causes = ()) -> Outcome[None]:
    """Remove a file after all earlier operations; done once the removal is durable."""
    return submit(partial(store.remove, name), store.path_of(name), exists=False, causes=causes)


def copy(store: Store, source: str, target: str, *, causes: Causes = ()) -> Outcome[None]:
    """Copy or hard-link `source`, which may be a pending save, to `target`."""
    make = partial(_prepared, store, partial(store.copy, source, target))
    return submit(make, store.path_of(target), exists=True, causes=causes)


def link(store: Store, source: str, target: str, *, causes: Causes = ()) -> Outcome[None]:
    """Make `target` a link to `source`, which may be a pending save."""
    make = partial(_prepared, store, partial(store.link, source, target))
    return submit(make, store.path_of(target), exists=True, causes=causes)


def call(func: Callable[[], object], path: str, *, exists: bool, causes: Causes = ()) -> Outcome[None]:
    """Queue a blocking function, to run on a worker thread.

    Args:
        func: the function.
        path: the file that it creates or removes.
        exists: whether the file exists afterwards.
        causes: earlier saves and operations; if one has failed, the function is not called and the outcome is
            `SaveSkipped`.
    """
    return submit(partial(in_thread, func), path, exists=exists, causes=causes)


def submit(
    action: Callable[[], Awaitable[object]], path: str, *, exists: bool, causes: Causes = ()
) -> Outcome[None]:
    """Queue an async function, to run on the engine's event loop; for the arguments see `call`."""
    operation = _FileOperation(action, path, causes, exists=exists)
    get_engine().submit(operation)
    return operation.outcome


class _FileOperation(Operation):
    def __init__(
        self,
        action: Callable[[], Awaitable[object]],
        path: str,
        causes: Causes,
        *,
        exists: bool,
    ) -> None:
        super().__init__({path: exists})
        self.outcome: Outcome[None] = Outcome()
        self._action = action
        self._path = path
        self._causes = causes

    async def run(self) -> None:
        failure: Exception | None = None
        if any(cause.failed() for cause in self._causes):
            failure = SaveSkipped(f"{self._path} is unchanged: an operation that it depends on failed")
        else:
            try:
                await self._action()
            except Exception as error:  # noqa: BLE001 - the outcome reports it
                failure = error
        self.effects = {}
        if failure is None:
            self.outcome.set_result(None)
        else:
            self.outcome.set_exception(failure)


async def _prepared(store: Store, make: Callable[[], Awaitable[None]]) -> None:
    """Create the directory if necessary, then call `make`."""
    await store.prepare()
    await make()
