"""Restore a checkpoint that is a file or a folder: read and check all of it first, then change the state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncckpt._loading.agreement import ALONE, Ranks
from asyncckpt._loading.folder import Folder
from asyncckpt._loading.folder_restore import FolderRestore
from asyncckpt._loading.load import Loaded, load_image
from asyncckpt._loading.restore import restore
from asyncckpt._loading.source import open_checkpoint
from asyncckpt.errors import warn_caller

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncckpt._loading.item_run import Place
    from asyncckpt._loading.reader import Image
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class RestoreTarget:
    """The live state that a checkpoint is restored into, and how.

    Attributes:
        state: the live state.
        call: runs a coroutine function on the engine's event loop.
        rank_state: live entries that only this rank has; None if there are none.
        ranks: who restores together.
        weights_only: as in torch.load.
        strict: require the same entries on both sides.
        map_keys: as `Checkpointer.restore` takes it.
        subset: leave out what only a folder has, without a word.
    """

    state: Any
    call: Callable[..., Any]
    rank_state: Any = None
    ranks: Ranks = ALONE
    weights_only: bool = True
    strict: bool = True
    map_keys: Callable[[str], str] | None = None
    subset: bool = False

    def prepare(self, store: Store, name: str) -> FileRestore | FolderRestore:
        """Read a checkpoint and compare it with the state, on all ranks; nothing is changed.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint, for any of the ranks.
            CorruptCheckpointError: it is damaged, for any of the ranks.
            StateMismatchError: a folder does not fit; the message lists each entry.
            UnsafeStateError, UnloadableStateError: as in `load_image`.
            SaveError: another rank cannot restore it; `Ranks.agree` raises it.
        """
        what = f"restore {store.path_of(name)}"
        found = self.ranks.together(what, lambda: self._read(store, name))
        if isinstance(found, Loaded):
            if self.rank_state is not None:
                warn_caller(f"{found.checkpoint.path} has no rank_state, which is left as it is")
            return FileRestore(self, found)
        restoring = FolderRestore(found, self._reader(found), self)
        what = f"{what} ({found.checkpoint.sequence}, {found.checkpoint.created})"
        self.ranks.together(f"{what}: plan", restoring.plan)
        self.ranks.together(f"{what}: read", restoring.read)
        return restoring

    def _read(self, store: Store, name: str) -> Loaded | Folder:
        found: Image | Folder = self.call(open_checkpoint, store, name)
        if isinstance(found, Folder):
            return found
        return load_image(found, "cpu", weights_only=self.weights_only)

    def _reader(self, folder: Folder) -> Callable[[Sequence[Place]], dict[Place, Image]]:
        def read(places: Sequence[Place]) -> dict[Place, Image]:
            images: dict[Place, Image] = self.call(folder.read, places)
            return images

        return read


@dataclass(frozen=True, slots=True, eq=False)
class FileRestore:
    """A file that was read, to be restored.

    Attributes:
        target: the live state.
        loaded: what is in the file.
    """

    target: RestoreTarget
    loaded: Loaded

    @property
    def checkpoint(self) -> Checkpoint:
        """What is restored."""
        return self.loaded.checkpoint

    def finish(self) -> None:
        """Put everything into the live state, on all ranks or on none; raises what `restore` does.

        Raises:
            SaveError: another rank cannot take the checkpoint; `Ranks.agree` raises it.
        """
        target, path = self.target, self.checkpoint.path
        restore(
            target.state,
            self.loaded.state,
            path,
            strict=target.strict,
            map_keys=target.map_keys,
            together=partial(target.ranks.together, f"restore {path}: copy"),
        )
