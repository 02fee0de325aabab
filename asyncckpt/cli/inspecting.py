"""`asyncckpt inspect`: what a file holds, without unpickling it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import read_contents
from asyncckpt._inspection.inert import clean, dtype_name, key_text, path_text
from asyncckpt._loading.load import read_file
from asyncckpt._saving.engine import get_engine
from asyncckpt.cli.locations import StorageOptions, file_at
from asyncckpt.cli.output import AsJson, counted, line, new_table, number, print_json, size
from asyncckpt.cli.states import ROWS, ShowAll, print_rest, print_rows, value_text
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asyncckpt._inspection.contents import Contents, Records
    from asyncckpt._inspection.inert import Storage, Tensor

File = Annotated[str, typer.Argument(metavar="FILE", show_default=False)]
Depth = Annotated[int, typer.Option(min=0, help="Levels of modules to sum up, below the top-level entries.")]

_VALUE_WIDTH = 80


def inspect(
    file: File,
    *,
    depth: Depth = 2,
    show_all: ShowAll = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, whoever wrote it, without unpickling it: nothing in it is run.

    This reads the file's directory and its data.pkl, and no tensor's values. The names that
    torch.load(weights_only=True) would refuse are listed last: do not load such a file with
    weights_only=False unless you trust whoever made it.

    Example: asyncckpt inspect model.pt
    """
    from asyncckpt._inspection.refusals import refused_globals  # noqa: PLC0415 - torch takes a second

    store, there = file_at(file, option)
    contents = get_engine().call(read_file, read_contents, store, there.name)
    inventory = _inventory(contents)
    refused = refused_globals(contents.globals)
    if as_json:
        print_json(_document(contents, inventory, depth, refused))
        return
    rows = None if show_all else ROWS
    _print_header(contents)
    _print_tensors(inventory, rows)
    _print_modules(inventory, depth, rows)
    _print_values(contents.values, rows)
    _print_refused(refused, rows)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a state.

    Attributes:
        nbytes: of its elements; None if this torch does not have its dtype.
        fits: whether all of its elements are in the file.
    """

    path: list[Any]
    tensor: Tensor
    nbytes: int | None
    fits: bool


@dataclass(slots=True)
class _Sum:
    """What the tensors under one prefix amount to: how many, their elements, and the bytes of those."""

    tensors: int = 0
    numel: int = 0
    nbytes: int = 0

    def add(self, entry: _Entry) -> None:
        self.tensors += 1
        self.numel += entry.tensor.numel
        self.nbytes += entry.nbytes or 0


@dataclass(slots=True)
class _Inventory:
    """What a state holds.

    Attributes:
        tensors: all, in order.
        sharing: for each storage that several tensors view, these.
        storages: those that are in the file, each once, with its size in bytes.
        total: over all tensors.
    """

    tensors: list[_Entry] = field(default_factory=list)
    sharing: dict[str, list[_Entry]] = field(default_factory=dict)
    storages: list[tuple[Storage, int]] = field(default_factory=list)
    total: _Sum = field(default_factory=_Sum)

    @property
    def stored(self) -> int:
        return sum(nbytes for _, nbytes in self.storages)


def _inventory(contents: Contents) -> _Inventory:
    result, views = _Inventory(), defaultdict[str, list[_Entry]](list)
    for path, tensor in contents.tensors:
        entry = _entry(path, tensor, contents.records)
        result.tensors.append(entry)
        result.total.add(entry)
        views[tensor.storage.key].append(entry)
    result.sharing = {key: entries for key, entries in views.items() if len(entries) > 1}
    sizes = {key: stop - start for key, (start, stop) in contents.records.payloads.items()}
    result.storages = [(storage, sizes[storage.key]) for storage in contents.storages if storage.key in sizes]
    return result


def _entry(path: list[Any], tensor: Tensor, records: Records) -> _Entry:
    from asyncckpt._inspection.tensor_values import dtype_of  # noqa: PLC0415

    dtype, fits = dtype_of(dtype_name(tensor)), False
    if dtype is not None:
        with suppress(CorruptCheckpointError):
            fits = records.place_of(tensor, dtype.itemsize) >= 0
    return _Entry(path, tensor, None if dtype is None else tensor.numel * dtype.itemsize, fits)


def _sums_by_module(entries: Sequence[_Entry], depth: int) -> dict[tuple[str, ...], _Sum]:
    """Return sums for each prefix of names, such as ("model", "layers", "0"), in order.

    Args:
        entries: the tensors.
        depth: how many levels below the entries of the state itself.
    """
    sums: dict[tuple[str, ...], _Sum] = {}
    for entry in entries:
        # A state dict has the names of modules in its keys, with dots between them.
        keys = (clean(key) if isinstance(key, str) else key_text(key) for key in entry.path[: depth + 2])
        names = [name for key in keys for name in key.split(".")]
        for length in range(1, min(len(names) - 1, depth + 1) + 1):
            sums.setdefault(tuple(names[:length]), _Sum()).add(entry)
    return sums


def _print_header(contents: Contents) -> None:
    summary, told = contents.summary, contents.summary.checkpoint
    versions = ", ".join(f"{name} {version}" for name, version in contents.versions.items())
    facts = {
        "written by": summary.writer + (f" ({versions})" if versions else ""),
        "created": _moment(told.created) if told.created else None,
        "step": told.step,
        "epoch": summary.epoch,
        "metrics": ", ".join(f"{name} {number(value)}" for name, value in told.metrics.items()),
        "byte order": None if contents.records.is_native else contents.records.byteorder,
    }
    line(f"{told.path}  {size(told.nbytes)} ({told.nbytes:,} bytes)", "bold")
    for name, value in facts.items():
        if value not in {None, ""}:
            line(f"  {name:<10}  {value}")


def _print_tensors(inventory: _Inventory, limit: int | None) -> None:
    total, entries = inventory.total, inventory.tensors
    if entries:
        table = new_table("tensor", "dtype", "shape", "bytes", "notes", right=("bytes",))
        for entry in entries[:limit]:
            tensor = entry.tensor
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            nbytes = "?" if entry.nbytes is None else size(entry.nbytes)
            notes = ", ".join(_notes(entry, inventory))
            table.add_row(path_text(entry.path), clean(dtype_name(tensor)), shape, nbytes, notes)
        print_rows(table, len(entries), limit)
    line(
        f"{counted(total.tensors, 'tensor')} of {total.numel:,} elements, {size(total.nbytes)},"
        f" on {counted(len(inventory.storages), 'storage')} of {size(inventory.stored)}"
    )


def _notes(entry: _Entry, inventory: _Inventory) -> Iterable[str]:
    tensor, sharing = entry.tensor, inventory.sharing.get(entry.tensor.storage.key, ())
    if sharing:
        other = next((one for one in sharing if one.path != entry.path), sharing[0])
        more = f" and {len(sharing) - 2} more" if len(sharing) > 2 else ""  # noqa: PLR2004 - itself, the other
        yield f"shares storage with {path_text(other.path)}{more}"
    if not entry.fits:
        yield "is not all in the file"
    elif tensor.numel != tensor.storage.numel:
        yield f"view of a storage of {counted(tensor.storage.numel, 'element')}"
    if not tensor.is_contiguous:
        yield f"stride {', '.join(map(str, tensor.stride))}"
    for what in ("conj", "neg", "requires_grad"):
        if getattr(tensor, what):
            yield what.replace("_", " ")
    if tensor.kind != "torch.Tensor":
        yield clean(tensor.kind.removeprefix("torch.nn.parameter."))
    if tensor.storage.location != "cpu":
        yield clean(tensor.storage.location)


def _print_modules(inventory: _Inventory, depth: int, limit: int | None) -> None:
    sums = _sums_by_module(inventory.tensors, depth)
    if not sums:
        return
    table = new_table("module", "tensors", "elements", "bytes", right=("tensors", "elements", "bytes"))
    for names, total in list(sums.items())[:limit]:
        label = "  " * (len(names) - 1) + key_text(names[-1])
        table.add_row(label, str(total.tensors), f"{total.numel:,}", size(total.nbytes))
    line("")
    print_rows(table, len(sums), limit)


def _print_values(values: Sequence[dict[str, Any]], limit: int | None) -> None:
    if values:
        table = new_table("entry", "value")
        for row in values[:limit]:
            table.add_row(path_text(row["path"]) or "(all)", value_text(row, _VALUE_WIDTH))
        line("")
        print_rows(table, len(values), limit)


def _print_refused(refused: Sequence[str], limit: int | None) -> None:
    if refused:
        line("")
        line("torch.load(weights_only=True) refuses this file, since it names:", "red")
        for name in refused[:limit]:
            line(f"  {name}", "red")
        print_rest(len(refused), limit)
        line("With weights_only=False whatever these do is done: only if you trust whoever made the file.")


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # no time that there ever was
        return f"{seconds} seconds since the epoch"


def _document(
    contents: Contents, inventory: _Inventory, depth: int, refused: Sequence[str]
) -> dict[str, Any]:
    """Return all of it for --json."""
    summary, told, total = contents.summary, contents.summary.checkpoint, inventory.total
    return {
        "path": told.path,
        "nbytes": told.nbytes,
        "written_by": summary.writer,
        "versions": dict(contents.versions),
        "created": told.created or None,
        "sequence": told.sequence or None,
        "step": told.step,
        "epoch": summary.epoch,
        "metrics": dict(told.metrics),
        "byteorder": contents.records.byteorder,
        "records": contents.records.count,
        "tensors": [_tensor_row(entry) for entry in inventory.tensors],
        "storages": [
            {"key": storage.key, "dtype": dtype_name(storage), "location": storage.location, "nbytes": nbytes}
            for storage, nbytes in inventory.storages
        ],
        "total": {
            "tensors": total.tensors,
            "elements": total.numel,
            "nbytes": total.nbytes,
            "storages": len(inventory.storages),
            "storage_nbytes": inventory.stored,
        },
        "modules": [
            {"path": list(names), "tensors": sum_.tensors, "elements": sum_.numel, "nbytes": sum_.nbytes}
            for names, sum_ in _sums_by_module(inventory.tensors, depth).items()
        ],
        "values": contents.values,
        "globals": list(contents.globals),
        "refused_by_weights_only": list(refused),
    }


def _tensor_row(entry: _Entry) -> dict[str, Any]:
    tensor = entry.tensor
    return {
        "path": entry.path,
        "dtype": dtype_name(tensor),
        "shape": list(tensor.shape),
        "nbytes": entry.nbytes,
        "kind": tensor.kind,
        "requires_grad": tensor.requires_grad,
        "storage": tensor.storage.key,
        "location": tensor.storage.location,
        "offset": tensor.offset,
        "stride": list(tensor.stride),
        "contiguous": tensor.is_contiguous,
        "in_file": entry.fits,
    }
