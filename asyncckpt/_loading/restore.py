"""Put a loaded state into live objects: all of it, or nothing."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.copies import copy_tensors
from asyncckpt._loading.restore_plan import Plan, some
from asyncckpt._loading.undo import put_back
from asyncckpt.errors import PartialRestoreError, StateMismatchError, add_note, warn_caller

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from asyncckpt._loading.undo import Step


def restore(  # noqa: PLR0913 - each is one decision of the user's
    live: Any,
    saved: Any,
    where: str,
    *,
    strict: bool = True,
    map_keys: Callable[[str], str] | None = None,
    together: Callable[[Callable[[], None]], object] = lambda work: work(),
) -> None:
    """Put `saved` into `live`: `load_state_dict` where there is one, tensors in place, values replaced.

    Dicts, lists and tuples that hold tensors or stateful objects are matched entry by entry. What holds none
    is a value, and is replaced as a whole: a list or a dict in place, so that other references see it.

    What may fail is changed first, and is put back if something does. Tensors come last: putting those back
    would take as much memory again, and every copy was checked.

    Raises:
        StateMismatchError: lists what does not fit, or what an object's loading raised; nothing was changed.
        PartialRestoreError: lists what could not be put back.
    """
    carry_out(Plan(live, saved, strict=strict, map_keys=map_keys), where, strict=strict, together=together)


def carry_out(
    plan: Plan,
    where: str,
    *,
    strict: bool,
    together: Callable[[Callable[[], None]], object] = lambda work: work(),
    after_copies: Callable[[], object] = lambda: None,
) -> None:
    """Change what a plan changes, completely or not at all.

    Args:
        plan: what to change.
        where: path of the checkpoint.
        strict: whether the plan requires the same entries on both sides.
        together: calls what changes all but the tensors; raises if that fails here, or on another rank, and
            it is put back.
        after_copies: called at the end, without interruption by signal handlers.

    Raises:
        StateMismatchError, PartialRestoreError: as `restore` does.
    """
    held: list[tuple[str, list[Step]]] = []
    grad = torch.is_grad_enabled()

    def change() -> None:
        raise_misfits(plan, where)
        for path, hold, apply in plan.changes:
            try:
                held.append((path, hold()))
                apply()
            except Exception as error:
                line = f"{path}: {type(error).__name__}: {error}"
                raise mismatch(plan, where, [line]) from error
        if not strict:
            _warn_of_what_is_left_out(plan, where)

    with DeferredSignals() as signals:
        try:
            together(change)
            signals.defer()
        except BaseException as error:
            signals.defer()
            torch.set_grad_enabled(grad)  # torch.no_grad may have been interrupted
            _raise_what_is_left(put_back(held), error, where)
            raise
        copied: list[str] = []
        try:
            copy_tensors(plan.copies, copied)
            after_copies()
        except (
            BaseException
        ) as error:  # the device failed, a mode of torch's took part, or code of the user's
            lines = [f"{path}: holds content of the checkpoint" for path in copied]
            _raise_what_is_left([*lines, *put_back(held)], error, where)
            raise


def raise_misfits(plan: Plan, where: str) -> None:
    """Raise StateMismatchError with a line for each entry that does not fit, if there are any."""
    if misfits := plan.misfits():
        raise mismatch(plan, where, misfits)


def _warn_of_what_is_left_out(plan: Plan, where: str) -> None:
    """Warn of the entries of only one side; raise StateMismatchError if there are no others."""
    if not plan.missing and not plan.unexpected:
        return
    if not plan.overlaps:
        raise mismatch(plan, where, [*plan.missing.values(), *plan.unexpected.values()])
    lines = [f"{where} is restored in part:"]
    if plan.missing:
        lines.append(f"not in the checkpoint, left as they are: {some(plan.missing)}")
    if plan.unexpected:
        lines.append(f"not in the state, not taken: {some(plan.unexpected)}")
    warn_caller("\n  ".join([*lines, *plan.hints]))


def mismatch(plan: Plan, where: str, lines: list[str]) -> StateMismatchError:
    """Return the error with a line for each entry that does not fit, and with the hints of the plan."""
    listing = "\n  ".join([f"{where} does not fit the state, of which nothing was changed:", *lines])
    return StateMismatchError("\n".join([listing, *plan.hints]))


def _raise_what_is_left(lines: list[str], error: BaseException, where: str) -> None:
    """Raise an error if not all could be put back; note it at an exception of the user's."""
    if not lines:
        return
    listing = [f"restoring {where} failed, and these entries could not be put back:", *dict.fromkeys(lines)]
    failure = PartialRestoreError("\n  ".join(listing))
    if isinstance(error, Exception):
        raise failure from error
    add_note(error, failure)


class DeferredSignals:
    """Defers the Python signal handlers of the main thread to the end of a `with` block, from `defer` on.

    A handler may raise (Ctrl-C does) at any line. Once one has, the others are deferred, so that they cannot
    break into what its exception sets off. Signals without a Python handler act as always, and other threads
    run no handlers.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: dict[int, Any] = {}
        self._deferring = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # SIG_DFL, SIG_IGN and handlers of C code are not callable.
            found = {number: signal.getsignal(number) for number in signal.valid_signals()}
            self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        try:
            self._install(dict.fromkeys(self._handlers, self._handle))
        except BaseException:
            self._install(self._handlers)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # One that was set in the block stays.
        ours = [number for number in self._handlers if signal.getsignal(number) == self._handle]
        self._install({number: self._handlers[number] for number in ours})
        self._deliver()

    def defer(self) -> None:
        """Defer handlers from now on."""
        self._deferring = True

    def _install(self, handlers: dict[int, Any]) -> None:
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        except BaseException:  # of a handler that was called meanwhile
            self._install(handlers)
            raise

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring:
            self._pending[number] = frame
            return
        self._deferring = True
        self._handlers[number](number, frame)
        self._deferring = False

    def _deliver(self) -> None:
        if self._pending:
            number, frame = self._pending.popitem()
            try:
                # Not by raising the signal anew: an event loop's wakeup descriptor was written to already.
                self._handlers[number](number, frame)
            finally:
                self._deliver()
