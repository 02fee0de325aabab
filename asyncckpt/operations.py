"""Changes of a store that wait their turn behind pending saves, and what will exist after them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from asyncckpt.engine import Operation, get_engine
from asyncckpt.save import Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncckpt.stores.base import Store


def remove(store: Store, name: str) -> Outcome[None]:
    """Remove a file once everything submitted before is carried out; done when that is durable."""
    return _submit(partial(store.remove, name), store.path_of(name), exists=False)


def copy(store: Store, source: str, target: str) -> Outcome[None]:
    """Make `target` a second name for the bytes of `source`, which may be a save that is still pending."""
    return _submit(partial(store.copy, source, target), store.path_of(target), exists=True)


def link(store: Store, source: str, target: str) -> Outcome[None]:
    """Make `target` refer to `source`, which may be a save that is still pending."""
    return _submit(partial(store.link, source, target), store.path_of(target), exists=True)


def exists(store: Store, name: str) -> bool:
    """Return whether a file will be there once everything submitted so far is carried out."""
    engine = get_engine()
    pending = engine.pending(store.path_of(name))
    return engine.call(_is_there, store, name) if pending is None else pending


def _submit(action: Callable[[], Awaitable[None]], path: str, *, exists: bool) -> Outcome[None]:
    outcome: Outcome[None] = Outcome()

    async def run() -> None:
        try:
            await action()
        except Exception as error:  # noqa: BLE001 - the caller holds the outcome
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    get_engine().submit(Operation(run, {path: exists}))
    return outcome


async def _is_there(store: Store, name: str) -> bool:
    try:
        await store.stat(name)
    except FileNotFoundError:
        return False
    return True
