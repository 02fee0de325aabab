"""Open what `asyncckpt diff` compares: files, and folders with the files of many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from asyncckpt._inspection.contents import decoded_tensor, read_records
from asyncckpt._inspection.inert import dtype_name
from asyncckpt._inspection.isolation import look_at
from asyncckpt._inspection.parts import MappedItem, Part
from asyncckpt._inspection.tensor_values import Side, map_file, open_side
from asyncckpt._loading.folder import with_folder
from asyncckpt._loading.folder_structure import check_files
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Mapping, Sequence

    from asyncckpt._inspection.inert import Tensor
    from asyncckpt._loading.folder import Folder
    from asyncckpt._loading.folder_index import TensorEntry
    from asyncckpt._loading.item_reader import Place
    from asyncckpt.stores.base import Store

    Progress = Callable[[int], None]


class Compared(Protocol):
    """One of two checkpoints that are compared.

    Attributes:
        path: path or URL.
        pickles: the path and the bytes of each pickle in it.
        entries: of a folder, as `look_at` takes them; None for a file.
    """

    path: str
    pickles: Sequence[tuple[str, bytes]]
    entries: Sequence[Any] | None

    def parts(self, tensor: Tensor) -> Sequence[Part]:
        """Return the parts of one of its tensors."""


class ComparedFile:
    """A file that is compared."""

    entries = None

    def __init__(self, side: Side) -> None:
        self._side = side
        self.path = side.records.path
        self.pickles = [(self.path, side.records.pickle)]

    def parts(self, tensor: Tensor) -> list[Part]:
        """Return the only part."""
        return [_whole(tensor, self._side)]


@dataclass(frozen=True, slots=True, eq=False)
class ComparedFolder:
    """A folder that is compared.

    Attributes:
        tensors: its tensors, in order.
        objects: the items of its other entries, in order.
        items: each item with a part of a tensor, and that part.
    """

    path: str
    pickles: Sequence[tuple[str, bytes]]
    entries: Sequence[Any]
    tensors: Sequence[TensorEntry]
    objects: Sequence[Side]
    items: Mapping[Place, tuple[Tensor, Side]]

    def parts(self, tensor: Tensor) -> list[Part]:
        """Return the parts that the ranks wrote.

        Raises:
            CorruptCheckpointError: an item does not hold what the metadata says.
        """
        owner, slash, key = tensor.storage.key.partition("/")
        if slash:  # of an object
            return [_whole(tensor._replace(storage=tensor.storage._replace(key=key)), self.objects[int(owner)])]
        entry = self.tensors[int(owner)]
        parts = []
        for offsets, (sizes, place) in entry.chunks.items():
            part, side = self.items[place]
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
    if is_folder:
        return await with_folder(partial(_open_folder, progress), store, name)
    return ComparedFile(await open_side(store, name, progress))


async def _open_folder(progress: Progress, folder: Folder) -> ComparedFolder:
    await check_files(folder)
    maps: dict[str, mmap.mmap] = {}
    for name in {place.file for place in folder.index.items}:
        try:
            async with folder.store.open(name) as file:
                maps[name] = await map_file(folder.store, file, progress)
        except FileNotFoundError:
            await folder.refuse_replaced()
            raise
    await folder.refuse_replaced()

    async def side_of(place: Place) -> Side:
        path = f"{folder.store.path_of(place.file)}, item {place.entry}"
        data = memoryview(maps[place.file])[place.offset : place.end]
        return Side(await read_records(MappedItem(path, data)), data)

    index = folder.index
    entries: list[Any] = []
    tensors: list[TensorEntry] = []
    objects: list[Side] = []
    for key in index.metadata.state_dict_metadata:
        path = list(index.paths.get(key, (key,)))
        if (tensor := index.tensors.get(key)) is None:
            entries.append([path])
            objects.append(await side_of(index.objects[key]))
        else:
            entries.append([path, str(len(tensors)), str(tensor.dtype), tensor.size])
            tensors.append(tensor)
    sides = {place: await side_of(place) for entry in tensors for place in entry.places}
    pickles = [(side.records.path, side.records.pickle) for side in objects]
    return ComparedFolder(folder.path, pickles, entries, tensors, objects, _tensors_in(sides))


def _tensors_in(sides: Mapping[Place, Side]) -> dict[Place, tuple[Tensor, Side]]:
    """Return the tensor in each item. Parts of one shape and dtype have one pickle."""
    paths = {side.records.pickle: side.records.path for side in reversed(sides.values())}
    rows = look_at("tensors", [(path, pickle) for pickle, path in paths.items()])["tensors"] if paths else []
    tensors = dict(zip(paths, map(decoded_tensor, rows), strict=True))
    return {place: (tensors[side.records.pickle], side) for place, side in sides.items()}


def _whole(tensor: Tensor, side: Side) -> Part:
    return Part((0,) * len(tensor.shape), tensor, side)
