"""Steps that all ranks take together, or none of them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from asyncckpt.errors import AsyncCkptError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def _alone(what: str, problem: str | None) -> None:
    """Agree with nobody."""
    del what, problem


class Ranks(NamedTuple):
    """The ranks that restore together.

    Attributes:
        agree: called on each rank with what it is about to do, and with what is in the way, if something is;
            raises on all ranks if that differs or anything is in the way on one of them.
        rank: of this process.
        size: how many there are.
    """

    agree: Callable[[str, str | None], object] = _alone
    rank: int = 0
    size: int = 1

    def together(self, what: str, work: Callable[[], T]) -> T:
        """Return what `work` returns, once it has ended well on all ranks.

        Whatever it raises here is raised here; the other ranks raise what `agree` does.

        Args:
            what: the same on all ranks.
            work: what to do.
        """
        try:
            result = work()
        except BaseException as error:
            text = str(error) if isinstance(error, AsyncCkptError) else f"{type(error).__name__}: {error}"
            with suppress(Exception):  # of a rank with a problem of its own
                self.agree(what, text)
            raise
        self.agree(what, None)
        return result
