"""Changes of files that wait their turn behind pending saves."""

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

    # Saves and operations that were submitted before: if one has failed, what follows is left undone.
    Causes = Sequence[Outcome[Checkpoint] | Outcome[None]]


def remove(store: Store, name: str, *, causes: Causes = ()) -> Outcome[None]:
    """Remove a file once everything submitted before is carried out; done when that is durable."""
    return submit(partial(store.remove, name), store.path_of(name), exists=False, causes=causes)


def copy(store: Store, source: str, target: str, *, causes: Causes = ()) -> Outcome[None]:
    """Make `target` a second name for the bytes of `source`, which may be a save that is still pending."""
    make = partial(_prepared, store, partial(store.copy, source, target))
    return submit(make, store.path_of(target), exists=True, causes=causes)


def link(store: Store, source: str, target: str, *, causes: Causes = ()) -> Outcome[None]:
    """Make `target` refer to `source`, which may be a save that is still pending."""
    make = partial(_prepared, store, partial(store.link, source, target))
    return submit(make, store.path_of(target), exists=True, causes=causes)


def call(func: Callable[[], object], path: str, *, exists: bool, causes: Causes = ()) -> Outcome[None]:
    """Call a blocking function in its turn, on a worker thread.

    Args:
        func: what to call.
        path: the file that it makes or removes.
        exists: which of the two.
        causes: earlier saves and operations; if one has failed, nothing is called, and the outcome is
            `SaveSkipped`.
    """
    return submit(partial(in_thread, func), path, exists=exists, causes=causes)


def submit(
    action: Callable[[], Awaitable[object]], path: str, *, exists: bool, causes: Causes = ()
) -> Outcome[None]:
    """Carry `action` out in its turn, on the engine's event loop; for the arguments see `call`."""
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
            failure = SaveSkipped(f"{self._path} was left as it was: what it follows has failed")
        else:
            try:
                await self._action()
            except Exception as error:  # noqa: BLE001 - the caller holds the outcome
                failure = error
        self.effects = {}
        if failure is None:
            self.outcome.set_result(None)
        else:
            self.outcome.set_exception(failure)


async def _prepared(store: Store, make: Callable[[], Awaitable[None]]) -> None:
    """Make something in a directory that may not be there yet."""
    await store.prepare()
    await make()
