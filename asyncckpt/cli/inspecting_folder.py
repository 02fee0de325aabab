"""`asyncckpt inspect` for a folder that many ranks wrote."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from asyncckpt._inspection.contents import decoded_tensor
from asyncckpt._inspection.inert import dtype_name
from asyncckpt._inspection.isolation import look_at
from asyncckpt._inspection.refusals import refused_globals
from asyncckpt._inspection.tensor_values import nbytes_of
from asyncckpt._inspection.texts import clean, path_text
from asyncckpt._loading.folder_index import TensorEntry
from asyncckpt._loading.folder_structure import check_files
from asyncckpt.cli.contents import (
    modules_of,
    nbytes_text,
    print_header,
    print_modules,
    print_refused,
    print_values,
    shape_text,
    sums_of,
)
from asyncckpt.cli.folders import read_folder
from asyncckpt.cli.formats import DCP
from asyncckpt.cli.locations import call
from asyncckpt.cli.output import counted, line, new_table, size
from asyncckpt.cli.states import print_rest, print_rows
from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.zip_format import ROOT

if TYPE_CHECKING:
    from asyncckpt._inspection.inert import Tensor
    from asyncckpt._loading.folder import Folder
    from asyncckpt.stores.base import Store

# Entries that are no tensors are read as a whole: those of a few bytes each, but not whole data sets.
_LARGEST, _TOGETHER = 16 << 20, 256 << 20


@dataclass(frozen=True, slots=True)
class _Objects:
    """The entries of a folder that are no tensors.

    Attributes:
        found: the key of each that was read, the path of its item, and its pickle.
        left: the keys and sizes of those that are too large to look at.
    """

    found: list[tuple[str, str, bytes]]
    left: dict[str, int]


def folder_document(store: Store, name: str, depth: int) -> dict[str, Any]:
    """Return the contents of a folder as the JSON document.

    Raises:
        CheckpointNotFoundError: there is no such folder.
        CorruptCheckpointError: it is damaged.
        StoreError: it could not be read.
    """
    folder, objects = call(read_folder, _read, store, name)
    index, description, checkpoint = folder.index, folder.description, folder.checkpoint
    tensors = [
        _tensor_row(_path(folder, key), entry)
        for key, entry in index.entries.items()
        if isinstance(entry, TensorEntry)
    ]
    pickles = [(where, pickle) for _, where, pickle in objects.found]
    each = look_at("each", pickles)["each"] if pickles else []
    values = []
    for (key, _, _), contents in zip(objects.found, each, strict=True):
        path = _path(folder, key)
        values += [row | {"path": [*path, *row["path"]]} for row in contents["values"]]
        tensors += [_object_row([*path, *below], decoded_tensor(row)) for below, row in contents["tensors"]]
    names = list(dict.fromkeys(name for contents in each for name in contents["globals"]))
    files: dict[str, dict[str, Any]] = {}
    for place in index.items:
        file = files.setdefault(place.file, {"name": place.file, "items": 0, "nbytes": 0})
        file["items"] += 1
        file["nbytes"] += place.length
    for extra, (nbytes, _) in (description.extras if description else {}).items():
        files[extra] = {"name": extra, "items": 0, "nbytes": nbytes}
    return {
        "path": folder.path,
        "nbytes": checkpoint.nbytes,
        "written_by": "asyncckpt" if description else DCP,
        "versions": dict(description.versions) if description else {},
        "created": checkpoint.created or None,
        "sequence": checkpoint.sequence or None,
        "step": checkpoint.step,
        "epoch": None,
        "metrics": dict(checkpoint.metrics),
        "ranks": description.ranks if description else None,
        "files": sorted(files.values(), key=lambda file: str(file["name"])),
        "tensors": tensors,
        "total": sums_of(tensors) | {"parts": sum(len(row["parts"]) for row in tensors)},
        "modules": modules_of(tensors, depth),
        "values": values,
        "too_large": [{"path": _path(folder, key), "nbytes": size} for key, size in objects.left.items()],
        "globals": names,
        "refused_by_weights_only": refused_globals(names),
    }


async def _read(folder: Folder) -> tuple[Folder, _Objects]:
    """Read the entries that are no tensors."""
    await check_files(folder)
    places, left, total = {}, {}, 0
    for key, place in folder.index.entries.items():
        if isinstance(place, TensorEntry):
            continue
        if place.length > _LARGEST or total + place.length > _TOGETHER:
            left[key] = place.length
        else:
            places[key] = place
            total += place.length
    images = await folder.read(list(places.values()))
    found = []
    for key, place in places.items():
        pickle = images[place].record(ROOT + "data.pkl")
        if pickle is None:
            raise CorruptCheckpointError(f"{images[place].path}: it has no record data.pkl")
        found.append((key, images[place].path, pickle))
    return folder, _Objects(found, left)


def _path(folder: Folder, key: str) -> list[Any]:
    return list(folder.index.paths.get(key, (key,)))


def _tensor_row(path: list[Any], entry: TensorEntry) -> dict[str, Any]:
    parts = [
        {
            "offsets": list(offsets),
            "shape": list(sizes),
            "file": place.file,
            "offset": place.offset,
            "nbytes": place.length,
        }
        for offsets, (sizes, place) in entry.chunks.items()
    ]
    return {
        "path": path,
        "dtype": str(entry.dtype).removeprefix("torch."),
        "shape": list(entry.size),
        "nbytes": prod(entry.size) * entry.dtype.itemsize,
        "parts": parts,
    }


def _object_row(path: list[Any], tensor: Tensor) -> dict[str, Any]:
    """Return the row of a tensor within an entry that is no tensor itself."""
    shape = list(tensor.shape)
    nbytes = nbytes_of(tensor)
    return {"path": path, "dtype": dtype_name(tensor), "shape": shape, "nbytes": nbytes, "parts": []}


def print_folder(found: dict[str, Any], limit: int | None) -> None:
    """Print what `folder_document` returns."""
    print_header(found)
    rows, total, files = found["tensors"], found["total"], found["files"]
    data = [file for file in files if file["items"]]
    if rows:
        table = new_table("tensor", "dtype", "shape", "bytes", "parts", right=("bytes", "parts"))
        for row in rows[:limit]:
            dtype, parts = clean(row["dtype"]), str(len(row["parts"]))
            table.add_row(path_text(row["path"]), dtype, shape_text(row), nbytes_text(row), parts)
        print_rows(table, len(rows), limit)
    stored = size(sum(file["nbytes"] for file in data))
    line(
        f"{counted(total['tensors'], 'tensor')} of {total['elements']:,} elements, {size(total['nbytes'])},"
        f" in {counted(total['parts'], 'part')}; {counted(len(data), 'file')} of {stored}"
    )
    for file in files:
        if not file["items"]:  # such as Lightning's meta.pt
            line(f"beside them: {file['name']}, {size(file['nbytes'])}")
    print_modules(found["modules"], limit)
    print_values(found["values"], limit)
    for row in found["too_large"][:limit]:
        line(f"too large to look at: {path_text(row['path'])}, {size(row['nbytes'])}", "yellow")
    print_rest(len(found["too_large"]), limit)
    print_refused(found["refused_by_weights_only"], limit, "weights_only=True refuses this checkpoint")
