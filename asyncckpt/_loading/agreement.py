"""Steps that all ranks take together, or none of them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from asyncckpt._loading.folder import FolderReplacedError
from asyncckpt.errors import AsyncCkptError, CheckpointNotFoundError, CorruptCheckpointError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    # Called on each rank with what it is about to do, with flags, and with what is in the way, if anything.
    # Returns which ranks raised each flag. Raises on all if the first differs or anything is in the way.
    Agree = Callable[[str, Collection[str], str | None], Mapping[str, Sequence[int]]]

T = TypeVar("T")

# What another checkpoint may make good, and what the ranks raise whose own part was whole.
_FLAGS: dict[str, tuple[tuple[type[Exception], ...], type[Exception]]] = {
    "replaced": ((FolderReplacedError,), FolderReplacedError),
    "gone": ((CheckpointNotFoundError,), CheckpointNotFoundError),
    "damaged": ((CorruptCheckpointError, StoreError), CorruptCheckpointError),
}


def _alone(what: str, flags: Collection[str], problem: str | None) -> Mapping[str, Sequence[int]]:
    """Agree with nobody."""
    del what, flags, problem
    return {}


class Ranks(NamedTuple):
    """The ranks that restore together.

    Attributes:
        agree: exchanges what the ranks are about to do.
        rank: of this process.
        size: how many there are.
    """

    agree: Agree = _alone
    rank: int = 0
    size: int = 1

    def together(self, what: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, once it has ended well on all ranks.

        Args:
            what: what it does; the same on all ranks.
            work: what to do.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError: the checkpoint is gone or damaged for any of the
                ranks; on all of them.
            BaseException: what `work` raised on this rank. The others raise what `agree` does.
        """
        try:
            result = work()
        except BaseException as error:
            self._tell(what, error)
            raise
        self._agree(what)
        return result

    def find(self, find: Callable[[], T], text: Callable[[T], str]) -> T:
        """Return what `find` finds, once all ranks have found the same, or raise its error if none found any.

        Args:
            find: looks for checkpoints.
            text: says what was found.

        Raises:
            SaveError: the ranks have found different things, or something is in the way on one of them.
            CheckpointNotFoundError: there are none, for any of the ranks.
        """
        try:
            found = find()
        except CheckpointNotFoundError:
            self.agree("restore: find no checkpoint", (), None)
            raise
        except BaseException as error:
            self._tell_problem("restore: find a checkpoint", error)
            raise
        self.agree(f"restore {text(found)}", (), None)
        return found

    def _agree(self, what: str, own: str | None = None) -> None:
        """Raise the same kind of error on all ranks if one has raised a flag; nothing if that is `own`."""
        found = self.agree(what, () if own is None else (own,), None)
        flag = next((flag for flag in _FLAGS if found.get(flag)), own)
        if flag is not None and flag != own:
            shown = ", ".join(map(str, found[flag]))
            raise _FLAGS[flag][1](
                f"{what}: the checkpoint is {flag}, as rank {shown} found; its error says more"
            )

    def _tell(self, what: str, error: BaseException) -> None:
        """Tell the other ranks of an error that is then raised here.

        Raises:
            CheckpointNotFoundError: the checkpoint is damaged here, and gone for another rank.
            SaveError: the checkpoint is damaged here, and something else is in the way on another rank.
        """
        flag = next((flag for flag, (kinds, _) in _FLAGS.items() if isinstance(error, kinds)), None)
        if flag is not None:
            self._agree(what, flag)
        else:
            self._tell_problem(what, error)

    def _tell_problem(self, what: str, error: BaseException) -> None:
        """Let the other ranks raise an error with the text of one that is then raised here."""
        text = str(error) if isinstance(error, AsyncCkptError) else f"{type(error).__name__}: {error}"
        with suppress(Exception):  # this rank raises its own
            self.agree(what, (), text)


ALONE = Ranks()
"""This process, which agrees with nobody."""
