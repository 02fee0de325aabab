"""What is checked of the checkpoints that are to stay, before others are removed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncckpt._loading.catalog import READERS
from asyncckpt._loading.reader import read_file, verify_file
from asyncckpt._loading.structure import check_structure
from asyncckpt._saving.engine import get_engine
from asyncckpt._threads import for_each
from asyncckpt.cli.output import bytes_progress, message
from asyncckpt.errors import AsyncCkptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint


def find_damage(store: Store, staying: Sequence[Checkpoint], wholly: Sequence[Checkpoint]) -> dict[str, str]:
    """Check files; returns what is wrong, by path.

    Args:
        store: where they are.
        staying: those whose directory and headers are checked.
        wholly: those of them of which every byte is, if that much is right.
    """
    found = get_engine().call(_structures, store, staying)
    whole = [checkpoint for checkpoint in wholly if checkpoint.path not in found]
    for number, checkpoint in enumerate(whole, 1):
        name = checkpoint.path.rpartition("/")[2]
        try:
            with bytes_progress(f"{number}/{len(whole)} {name}", checkpoint.nbytes) as advance:
                get_engine().call(verify_file, store, name, advance)
        except (AsyncCkptError, OSError) as error:
            found[checkpoint.path] = message(error)
    return found


async def _structures(store: Store, checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    found = {}

    async def check(checkpoint: Checkpoint) -> None:
        try:
            await read_file(check_structure, store, checkpoint.path.rpartition("/")[2])
        except (AsyncCkptError, OSError) as error:
            found[checkpoint.path] = message(error)

    await for_each(check, checkpoints, READERS)
    return found
