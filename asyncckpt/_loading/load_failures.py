"""Say what it means that torch.load fails on a file whose every byte is as it was written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from asyncckpt._inspection.inert import read_pickle
from asyncckpt._inspection.isolation import look_at
from asyncckpt._inspection.refusals import foreign_globals, listing, refused_entries
from asyncckpt._loading.unpickle import is_device
from asyncckpt.errors import AsyncCkptError, CorruptCheckpointError, UnloadableStateError, UnsafeStateError

if TYPE_CHECKING:
    from collections.abc import Collection

    from asyncckpt._inspection.inert import Pickled


_REFUSAL = "Weights only load failed"  # how torch begins what its weights-only unpickler says
_SAID = re.compile(r"WeightsUnpickler error: ([^\n]+)")
_NEEDS_IMPORT = "must be imported"
_ALLOCATION = re.compile(r"tried to allocate (\d+) bytes")
_SHOWN_NAMES = 5


def load_failure(
    error: Exception, where: str, data_pickle: bytes, sizes: Collection[int]
) -> AsyncCkptError | None:
    """Return the error to raise in place of what torch.load raised; None if that says it best.

    Args:
        error: what torch.load raised.
        where: the path of the file.
        data_pickle: the record with the state.
        sizes: bytes of each storage in the file.
    """
    if isinstance(error, Warning):  # that the user's filters turn into errors
        return None
    is_refused = str(error).startswith(_REFUSAL)
    try:
        look_at("contents", [(where, data_pickle)])  # within limits; what follows costs about as much
        pickled = read_pickle(data_pickle, slow=True)
    except CorruptCheckpointError as failure:
        if is_refused and "damaged" not in str(failure):  # it takes too much
            return _unsafe(where, f"weights_only=True refuses it: {_reason(str(error))}")
        return failure
    except Exception as damage:  # noqa: BLE001 - whatever a damaged pickle comes to
        reason = str(damage) or type(damage).__name__
        return CorruptCheckpointError(f"{where}: its data.pkl is damaged: {reason}; use another checkpoint")
    if is_refused:
        return _refused(error, where, pickled)
    allocation = _ALLOCATION.search(str(error))
    is_too_large = allocation is not None and int(allocation[1]) in sizes
    return None if is_too_large else _broken(error, where, pickled)


def _refused(error: Exception, where: str, pickled: Pickled) -> UnsafeStateError:
    entries, text = refused_entries(pickled), str(error)
    what = f"weights_only=True refuses {listing(entries)}" if entries else "weights_only=True refuses it"
    if not entries or _NEEDS_IMPORT in text:
        what += f": {_reason(text)}"
    return _unsafe(where, what)


def _unsafe(where: str, what: str) -> UnsafeStateError:
    return UnsafeStateError(
        f"{where}: {what}; if you trust the file, load it with weights_only=False, or allow these names with"
        " torch.serialization.add_safe_globals"
    )


def _broken(error: Exception, where: str, pickled: Pickled) -> AsyncCkptError:
    """Return the error for a state that torch allows, but cannot build."""
    if unknown := [storage.location for storage in pickled.storages if not is_device(storage.location)]:
        return UnloadableStateError(
            f'{where}: it has tensors on "{unknown[0]}", a device that torch does not know here; load it with'
            ' map_location="cpu", or import the package that adds the device'
        )
    reason = f"{type(error).__name__}: {error}"
    if names := foreign_globals(pickled.globals):
        shown = ", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else "")
        return UnloadableStateError(
            f"{where}: its objects cannot be rebuilt ({reason}); they need {shown} as it was when they were"
            " saved"
        )
    return CorruptCheckpointError(f"{where}: its data.pkl makes no sense ({reason}); use another checkpoint")


def _reason(refusal: str) -> str:
    """Return what the unpickler said, without the advice that torch puts around it."""
    if said := _SAID.search(refusal):
        return said[1].strip()
    parts = refusal.split("\n\n")
    return parts[1].strip() if len(parts) > 2 else refusal.partition(". ")[2].partition("\n")[0]  # noqa: PLR2004
