"""Put a loaded state into live objects: all of it, or nothing."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._caller_warning import warn_caller
from asyncckpt._loading.deferral import DeferredSignals
from asyncckpt._loading.matching import Match
from asyncckpt._loading.undo import Undo, hold_container, hold_stateful, hold_tensor
from asyncckpt.errors import PartialRestoreError, StateMismatchError, add_note

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

# How many entries of each kind a warning lists.
_LISTED = 10


def apply_state(
    live: Any, saved: Any, where: str, *, strict: bool = True, map_keys: Callable[[str], str] | None = None
) -> None:
    """Put `saved` into `live`: `load_state_dict` where there is one, tensors in place, values replaced.

    Dicts, lists and tuples that hold tensors or stateful objects are matched entry by entry. What holds none
    is a value, and is replaced as a whole: a list or a dict in place, so that other references see it.

    Args:
        live: what was given to `save`: stateful objects, tensors and values in dicts, lists and tuples.
        saved: what was loaded.
        where: the checkpoint's path, for messages.
        strict: whether both must have the same entries. If not, entries of only one side are left out, and
            one warning lists them.
        map_keys: applied to each string key of the state dicts of modules, and of dicts that hold tensors
            only, as they were loaded, before they are matched.

    Raises:
        StateMismatchError: lists each entry that is missing, unexpected or of another shape, or what an
            object's loading raised. Nothing was changed.
        PartialRestoreError: lists what could not be put back.
    """
    if map_keys is not None and not callable(map_keys):
        raise TypeError(f"map_keys must be a function of a key, not {map_keys!r}")
    match = Match(map_keys)
    match.state(live, saved)
    lines = match.problems
    if strict:
        lines = [*lines, *match.missing.values(), *match.unexpected.values()]
        match.hint_at_a_part()
    if lines:
        raise _mismatch(match, where, [*lines, *match.doubts])
    undo = Undo()
    with DeferredSignals() as signals:
        try:
            with signals.allowed():
                _change_what_may_fail(match, undo, where, strict=strict)
                if not strict:
                    _tell_what_was_left_out(match, where)
        except BaseException as error:
            _raise_what_is_left(undo.put_back(), error, where)
            raise
        _change_what_cannot_fail(match, undo, where)


def _change_what_may_fail(match: Match, undo: Undo, where: str, *, strict: bool) -> None:
    """Change what code of others takes part in, and what takes little memory to put back."""
    for load in match.loads:
        with _as_mismatch(match, load.path, where):
            undo.keep(load.path, hold_stateful(load.target))
            load.carry_out(strict=strict)
            _refuse_meta(load.target, load.content)
        match.missing |= load.missing
        match.unexpected |= load.unexpected
        match.taken += load.taken
    for path, tensor, content in match.odd_tensors:
        with _as_mismatch(match, path, where), torch.no_grad():
            undo.keep(path, hold_tensor(tensor))
            tensor.copy_(content)
    held = set()
    for path, container, change in match.changes:
        with _as_mismatch(match, path, where):
            if id(container) not in held:
                held.add(id(container))
                undo.keep(path, [hold_container(container)])
            change()


def _change_what_cannot_fail(match: Match, undo: Undo, where: str) -> None:
    """Change what would take as much memory again to put back: every entry of it was checked."""
    changed: list[str] = []
    try:
        for load in match.modules:
            changed.append(load.path)
            load.carry_out(strict=False)
        with torch.no_grad():
            for path, tensor, content in match.tensors:
                changed.append(path)
                tensor.copy_(content)
    except BaseException as error:  # the device failed, or a mode of torch's took part
        left = [f"{path}: holds content of the checkpoint" for path in changed]
        _raise_what_is_left([*left, *undo.put_back()], error, where)
        raise


def _refuse_meta(target: Any, content: Any) -> None:
    """Raise if a module took values into meta tensors, where torch drops them."""
    if not isinstance(target, torch.nn.Module):
        return
    own = target.state_dict()
    dropped = [key for key, value in own.items() if _is_meta(value) and not _is_meta(content.get(key, value))]
    if dropped:
        raise ValueError(
            f"tensors on the meta device took no values: {_some(dropped)}; materialize them first"
        )


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _tell_what_was_left_out(match: Match, where: str) -> None:
    """Warn of the entries of only one side; raise if there are no others.

    Raises:
        StateMismatchError: the two have no entry in common.
    """
    if not match.missing and not match.unexpected:
        return
    if match.taken == 0:
        raise _mismatch(match, where, [*match.missing.values(), *match.unexpected.values()])
    told = [f"{where} is restored in part:"]
    if match.missing:
        told.append(f"not in the checkpoint, left as they are: {_some(match.missing)}")
    if match.unexpected:
        told.append(f"not in the state, not taken: {_some(match.unexpected)}")
    warn_caller("\n  ".join([*told, *match.hints]))


def _some(paths: Collection[str]) -> str:
    rest = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(islice(paths, _LISTED)) + rest


def _mismatch(match: Match, where: str, lines: list[str]) -> StateMismatchError:
    listing = "\n  ".join([f"{where} does not fit the state, of which nothing was changed:", *lines])
    return StateMismatchError("\n".join([listing, *match.hints]))


@contextmanager
def _as_mismatch(match: Match, path: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _mismatch(match, where, [f"{path}: {type(error).__name__}: {error}"]) from error


def _raise_what_is_left(lines: list[str], error: BaseException, where: str) -> None:
    """Raise an error if not all could be put back; note it at an exception of the user's."""
    if not lines:
        return
    listing = "\n  ".join(
        [f"restoring {where} failed, and these entries could not be put back:", *dict.fromkeys(lines)]
    )
    failure = PartialRestoreError(listing)
    if isinstance(error, Exception):
        raise failure from error
    add_note(error, failure)
