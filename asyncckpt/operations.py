"""Changes of files that wait their turn behind pending saves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from asyncckpt.engine import Operation, get_engine
from asyncckpt.save import Outcome
from asyncckpt.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

    # A save or an operation that was submitted before: where that has failed, what follows it is left undone.
    Cause = Outcome[Checkpoint] | Outcome[None] | None


def remove(store: Store, name: str, *, cause: Cause = None) -> Outcome[None]:
    """Remove a file once everything submitted before is carried out; done when that is durable."""
    return submit(partial(store.remove, name), store.path_of(name), exists=False, cause=cause)


def copy(store: Store, source: str, target: str, *, cause: Cause = None) -> Outcome[None]:
    """Make `target` a second name for the bytes of `source`, which may be a save that is still pending."""
    return submit(partial(store.copy, source, target), store.path_of(target), exists=True, cause=cause)


def link(store: Store, source: str, target: str, *, cause: Cause = None) -> Outcome[None]:
    """Make `target` refer to `source`, which may be a save that is still pending."""
    return submit(partial(store.link, source, target), store.path_of(target), exists=True, cause=cause)


def call(func: Callable[[], object], path: str, *, exists: bool, cause: Cause = None) -> Outcome[None]:
    """Call a blocking function in its turn, on a worker thread.

    Args:
        func: what to call.
        path: the file that it makes or removes.
        exists: which of the two.
        cause: an earlier save or operation; where that has failed, nothing is called.
    """
    return submit(partial(in_thread, func), path, exists=exists, cause=cause)


def submit(
    action: Callable[[], Awaitable[object]], path: str, *, exists: bool, cause: Cause = None
) -> Outcome[None]:
    """Carry `action` out in its turn, on the engine's event loop; for the arguments see `call`."""
    outcome: Outcome[None] = Outcome()

    async def run() -> None:
        try:
            if cause is None or not cause.failed():
                await action()
        except Exception as error:  # noqa: BLE001 - the caller holds the outcome
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    get_engine().submit(Operation(run, {path: exists}))
    return outcome
