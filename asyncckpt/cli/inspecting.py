"""`asyncckpt inspect`: what a file holds, without unpickling it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import read_contents
from asyncckpt._inspection.inventory import sums_by_module, take_inventory
from asyncckpt._inspection.tensor_values import is_native
from asyncckpt._inspection.unsafe import refused_globals
from asyncckpt._outline.texts import clean, key_text, path_text, short
from asyncckpt.cli.locations import StorageOptions, call, file_at
from asyncckpt.cli.output import AsJson, counted, line, new_table, number, print_json, size
from asyncckpt.cli.states import ROWS, ShowAll, json_path, json_value, print_rest, print_rows
from asyncckpt.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asyncckpt._inspection.contents import Contents
    from asyncckpt._inspection.inventory import Inventory, TensorEntry

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
    store, there = file_at(file, option)
    from asyncckpt._loading.load import read_file

    contents = call(read_file, read_contents, store, there.name)
    try:
        inventory = take_inventory(contents.outline, contents.payloads)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{contents.summary.checkpoint.path}: {error}") from error
    refused = refused_globals(contents.outline.globals)
    if as_json:
        print_json(_document(contents, inventory, depth, refused))
        return
    rows = None if show_all else ROWS
    _print_header(contents)
    _print_tensors(inventory, rows)
    _print_modules(inventory, depth, rows)
    _print_values(inventory, rows)
    _print_refused(refused, rows)


def _print_header(contents: Contents) -> None:
    summary, told = contents.summary, contents.summary.checkpoint
    versions = ", ".join(f"{name} {version}" for name, version in contents.versions.items())
    facts = {
        "written by": summary.writer + (f" ({versions})" if versions else ""),
        "created": _moment(told.created) if told.created else None,
        "step": told.step,
        "epoch": summary.epoch,
        "metrics": ", ".join(f"{name} {number(value)}" for name, value in told.metrics.items()),
        "byte order": None if is_native(contents.byteorder) else contents.byteorder,
    }
    line(f"{told.path}  {size(told.nbytes)} ({told.nbytes:,} bytes)", "bold")
    for name, value in facts.items():
        if value not in {None, ""}:
            line(f"  {name:<10}  {value}")


def _print_tensors(inventory: Inventory, limit: int | None) -> None:
    total, entries = inventory.total, inventory.tensors
    if entries:
        table = new_table("tensor", "dtype", "shape", "bytes", "notes", right=("bytes",))
        for entry in entries[:limit]:
            tensor = entry.tensor
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            nbytes = "?" if entry.nbytes is None else size(entry.nbytes)
            notes = ", ".join(_notes(entry, inventory))
            table.add_row(path_text(entry.path), clean(tensor.dtype), shape, nbytes, notes)
        print_rows(table, len(entries), limit)
    stored = sum(nbytes for _, nbytes in inventory.storages)
    line(
        f"{counted(total.tensors, 'tensor')} of {total.numel:,} elements, {size(total.nbytes)},"
        f" on {counted(len(inventory.storages), 'storage')} of {size(stored)}"
    )


def _notes(entry: TensorEntry, inventory: Inventory) -> Iterable[str]:
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


def _print_modules(inventory: Inventory, depth: int, limit: int | None) -> None:
    sums = sums_by_module(inventory.tensors, depth)
    if not sums:
        return
    table = new_table("module", "tensors", "elements", "bytes", right=("tensors", "elements", "bytes"))
    for names, total in list(sums.items())[:limit]:
        label = "  " * (len(names) - 1) + key_text(names[-1])
        table.add_row(label, str(total.tensors), f"{total.numel:,}", size(total.nbytes))
    line("")
    print_rows(table, len(sums), limit)


def _print_values(inventory: Inventory, limit: int | None) -> None:
    if inventory.values:
        table = new_table("entry", "value")
        for path, node in inventory.values[:limit]:
            table.add_row(path_text(path) or "(all)", short(node, _VALUE_WIDTH))
        line("")
        print_rows(table, len(inventory.values), limit)


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


def _document(contents: Contents, inventory: Inventory, depth: int, refused: Sequence[str]) -> dict[str, Any]:
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
        "byteorder": contents.byteorder,
        "records": contents.records,
        "tensors": [_tensor_row(entry) for entry in inventory.tensors],
        "storages": [
            {"key": storage.key, "dtype": storage.dtype, "location": storage.location, "nbytes": nbytes}
            for storage, nbytes in inventory.storages
        ],
        "total": {
            "tensors": total.tensors,
            "elements": total.numel,
            "nbytes": total.nbytes,
            "storages": len(inventory.storages),
            "storage_nbytes": sum(nbytes for _, nbytes in inventory.storages),
        },
        "modules": [
            {"path": list(names), "tensors": sum_.tensors, "elements": sum_.numel, "nbytes": sum_.nbytes}
            for names, sum_ in sums_by_module(inventory.tensors, depth).items()
        ],
        "values": [{"path": json_path(path), **json_value(node)} for path, node in inventory.values],
        "globals": list(contents.outline.globals),
        "refused_by_weights_only": list(refused),
    }


def _tensor_row(entry: TensorEntry) -> dict[str, Any]:
    tensor = entry.tensor
    return {
        "path": json_path(entry.path),
        "dtype": tensor.dtype,
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
