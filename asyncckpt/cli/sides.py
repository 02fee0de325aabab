"""Open what `asyncckpt diff` compares: files, and folders with the files of many ranks."""

from __future__ import annotations

import resource
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.contents import decoded_tensor, read_records
from asyncckpt._inspection.inert import dtype_name
from asyncckpt._inspection.isolation import look_at
from asyncckpt._inspection.memory_file import MemoryFile
from asyncckpt._inspection.parts import Part
from asyncckpt._inspection.tensor_values import Side, map_file, open_side
from asyncckpt._loading.folder_index import TensorEntry, places_of
from asyncckpt._loading.folder_structure import check_files
from asyncckpt.cli.folders import read_folder
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asyncckpt._inspection.inert import Tensor
    from asyncckpt._loading.folder import Folder
    from asyncckpt._loading.item_run import Place
    from asyncckpt.stores.base import Store

    Progress = Callable[[int], None]


class Compared(ABC):
    """One of two checkpoints that are compared.

    Attributes:
        path: path or URL.
        pickles: the path and the bytes of each pickle in it.
        entries: of a folder, as `look_at` takes them; None for a file.
    """

    path: str
    pickles: Sequence[tuple[str, bytes]]
    entries: Sequence[Any] | None = None

    @abstractmethod
    def parts(self, tensor: Tensor) -> list[Part]:
        """Return the parts of one of its tensors.

        Raises:
            CorruptCheckpointError: an item of a folder does not hold what the metadata says.
        """


class ComparedFile(Compared):
    """A file that is compared.

    Args:
        side: the file.
    """

    def __init__(self, side: Side) -> None:
        self.path = side.records.path
        self.pickles = [(self.path, side.records.pickle)]
        self._side = side

    def parts(self, tensor: Tensor) -> list[Part]:
        """Return the only part."""
        return [_whole(tensor, self._side)]


class ComparedFolder(Compared):
    """A folder that is compared.

    Args:
        folder: the folder.
        sides: each of its items.
    """

    def __init__(self, folder: Folder, sides: Mapping[Place, Side]) -> None:
        self.path = folder.path
        self._tensors: list[TensorEntry] = []
        self._objects: list[Side] = []
        entries: list[Any] = []
        for key, entry in folder.index.entries.items():
            path = list(folder.index.paths.get(key, (key,)))
            if isinstance(entry, TensorEntry):
                entries.append([path, str(len(self._tensors)), str(entry.dtype), entry.size])
                self._tensors.append(entry)
            else:
                entries.append([path])
                self._objects.append(sides[entry])
        self.entries = entries
        self.pickles = [(side.records.path, side.records.pickle) for side in self._objects]
        self._items = _tensors_in({place: sides[place] for place in places_of(self._tensors)})

    def parts(self, tensor: Tensor) -> list[Part]:
        """Return the parts that the ranks wrote."""
        owner, slash, key = tensor.storage.key.partition("/")
        if slash:  # of an entry that is an object
            own = tensor._replace(storage=tensor.storage._replace(key=key))
            return [_whole(own, self._objects[int(owner)])]
        entry = self._tensors[int(owner)]
        parts = []
        for offsets, (sizes, place) in entry.chunks.items():
            part, side = self._items[place]
            dtype = str(entry.dtype).removeprefix("torch.")
            if part.shape != sizes or dtype_name(part) != dtype:
                raise CorruptCheckpointError(
                    f"{side.records.path} holds {dtype_name(part)} {list(part.shape)} instead of {dtype}"
                    f" {list(sizes)}, of which the metadata of the folder speaks; they are of different saves"
                )
            parts.append(Part(offsets, part, side))
        return parts


async def open_compared(store: Store, name: str, progress: Progress, *, is_folder: bool) -> Compared:
    """Read what a checkpoint holds and map its files; those of a remote store are copied for that.

    Raises:
        CheckpointNotFoundError: it was removed, or a file was replaced meanwhile.
        CorruptCheckpointError: it is damaged or another format.
        StoreError: it could not be read.
    """
    if not is_folder:
        return ComparedFile(await open_side(store, name, progress))

    async def open_it(folder: Folder) -> ComparedFolder:
        return ComparedFolder(folder, await _sides_of(folder, progress))

    return await read_folder(open_it, store, name)


async def _sides_of(folder: Folder, progress: Progress) -> dict[Place, Side]:
    """Map the files of a folder, and return each item in them."""
    _raise_file_limit()
    await check_files(folder)
    sides: dict[Place, Side] = {}
    by_file: defaultdict[str, list[Place]] = defaultdict(list)
    for place in folder.index.places:
        by_file[place.file].append(place)
    for name, places in by_file.items():
        try:
            async with folder.store.open(name) as file:
                data = memoryview(await map_file(folder.store, file, progress))
        except FileNotFoundError:
            await folder.refuse_replaced()
            raise
        for place in places:
            item = MemoryFile(f"{file.path}, item {place.entry}", data[place.offset : place.end])
            sides[place] = Side(await read_records(item), item.data)
    await folder.refuse_replaced()
    return sides


def _raise_file_limit() -> None:
    """Allow as many open files as the system does: each file of each rank stays open while it is mapped."""
    with suppress(OSError, ValueError):  # not every system has a limit that is a number
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _tensors_in(sides: Mapping[Place, Side]) -> dict[Place, tuple[Tensor, Side]]:
    """Return the tensor in each item. Those of one shape and dtype have one pickle."""
    paths: dict[bytes, str] = {}
    for side in sides.values():
        paths.setdefault(side.records.pickle, side.records.path)
    rows = look_at("tensors", [(path, pickle) for pickle, path in paths.items()])["tensors"] if paths else []
    tensors = dict(zip(paths, map(decoded_tensor, rows), strict=True))
    return {place: (tensors[side.records.pickle], side) for place, side in sides.items()}


def _whole(tensor: Tensor, side: Side) -> Part:
    return Part((0,) * len(tensor.shape), tensor, side)
