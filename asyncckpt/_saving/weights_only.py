"""Warn of entries of a state that torch.load will refuse by default, with `weights_only=True`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.inert import read_pickle
from asyncckpt._inspection.refusals import Refused, foreign_globals, listing, refused_entries, refused_globals

if TYPE_CHECKING:
    from collections.abc import Collection

    from asyncckpt._snapshot.frozen import FrozenState

# Matches each GLOBAL of a pickle of protocol 2, and some strings that look like one.
_GLOBAL = re.compile(rb"c([A-Za-z_][\w.]*)\n([A-Za-z_][\w.]*)\n")


@dataclass(slots=True)
class WeightsOnlyCheck:
    """Warn of entries that will be refused, once for each kind of object over successive states."""

    _kinds: int = field(default=0, init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def warning(self, frozen: FrozenState, kinds: Collection[Any]) -> str | None:
        """Return the text of a warning; None if there is no new kind of object that is refused.

        Args:
            frozen: the state.
            kinds: `Freezer.kinds`; the state is examined only if their number has changed.
        """
        if len(kinds) == self._kinds:
            return None
        self._kinds = len(kinds)
        names = {f"{module.decode()}.{name.decode()}" for module, name in _GLOBAL.findall(frozen.pickled)}
        foreign = foreign_globals(sorted(names))
        if not foreign:
            return None
        try:
            refused = refused_entries(read_pickle(frozen.pickled), kinds)
        except Exception:  # noqa: BLE001 - a warning fails no save: say it of the state as a whole
            refused = {"": Refused(dict.fromkeys(refused_globals(foreign)), {"state": None})}
        news = {name: entries for name, entries in refused.items() if name not in self._warned}
        self._warned.update(news)
        if not news:
            return None
        return (
            f"weights_only=True, the default of load and restore, will refuse {listing(news)}; load with"
            " weights_only=False, or save tensors and plain numbers instead, or allow these names with"
            " torch.serialization.add_safe_globals"
        )
