"""From a folder of many ranks to one state, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from asyncckpt._loading.folder_index import TensorEntry, nested
from asyncckpt._loading.item_tensor import ItemTensors
from asyncckpt._loading.load import Loaded, load_image

if TYPE_CHECKING:
    from torch.storage import UntypedStorage

    from asyncckpt._loading.folder import Folder
    from asyncckpt._loading.item_run import Place
    from asyncckpt._loading.reader import Image
    from asyncckpt._loading.unpickle import MapLocation


@dataclass(frozen=True, slots=True, eq=False)
class FolderImage:
    """A whole folder in memory, every item of it checked.

    Attributes:
        folder: its metadata.
        images: its items.
    """

    folder: Folder
    images: dict[Place, Image]


async def read_folder_image(folder: Folder) -> FolderImage:
    """Read all items of a folder; raises what `Folder.read` does."""
    return FolderImage(folder, await folder.read(folder.index.places))


def load_folder(
    image: FolderImage, map_location: MapLocation = "cpu", *, weights_only: bool | None
) -> Loaded:
    """Build the state of a folder: tensors whole, in dicts and lists as they were flattened.

    Args:
        image: the folder; its items are given up one by one.
        map_location: as in torch.load; all tensors that ranks shared were saved from "cpu".
        weights_only: as in torch.load, for entries that are no tensors.

    Raises:
        CorruptCheckpointError: an item is not what the metadata says, or makes no sense.
        UnsafeStateError: `weights_only` does not allow what is in it; names the entry.
        UnloadableStateError: its objects cannot be rebuilt here.
    """
    index, images = image.folder.index, image.images
    makes = ItemTensors()
    values: dict[str, Any] = {}
    for key, entry in index.entries.items():
        if isinstance(entry, TensorEntry):
            values[key] = _placed(whole_tensor(entry, images, makes), map_location)
        else:
            values[key] = load_image(images.pop(entry), map_location, weights_only=weights_only).state
    return Loaded(nested(values, index.paths), image.folder.checkpoint)


def whole_tensor(entry: TensorEntry, images: dict[Place, Image], makes: ItemTensors) -> torch.Tensor:
    """Return a tensor of all its chunks; their memory is given back as they are copied."""
    if entry.size in (sizes for sizes, _ in entry.chunks.values()):  # in one piece
        return makes.tensor(images.pop(entry.places[0]), entry.dtype, entry.size)
    whole = torch.empty(entry.size, dtype=entry.dtype)
    for offsets, (sizes, place) in entry.chunks.items():
        region = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        whole[region].copy_(makes.tensor(images.pop(place), entry.dtype, sizes))
    return whole


def _placed(tensor: torch.Tensor, map_location: MapLocation) -> torch.Tensor:
    """Return a tensor where a `map_location` puts what was saved from "cpu"."""
    if isinstance(map_location, dict):
        return tensor.to(map_location.get("cpu", "cpu"))
    if not callable(map_location):
        return tensor if map_location is None else tensor.to(map_location)
    storage: UntypedStorage | None = map_location(tensor.untyped_storage(), "cpu")
    if storage is None:
        return tensor
    made = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
