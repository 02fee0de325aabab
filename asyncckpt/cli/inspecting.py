"""`asyncckpt inspect`: the contents of a file or a folder, without unpickling it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import read_contents
from asyncckpt._inspection.inert import dtype_name
from asyncckpt._inspection.texts import clean, path_text
from asyncckpt._loading.reader import read_file
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
from asyncckpt.cli.locations import StorageOptions, call, checkpoint_at
from asyncckpt.cli.output import AsJson, counted, line, new_table, print_json, size
from asyncckpt.cli.states import ROWS, ShowAll, print_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asyncckpt._inspection.contents import Contents, Records
    from asyncckpt._inspection.inert import Tensor

Path = Annotated[str, typer.Argument(metavar="FILE|FOLDER", show_default=False)]
Depth = Annotated[
    int, typer.Option(min=0, help="Levels of modules in the summary, below the top-level entries.")
]


def inspect(
    path: Path,
    *,
    depth: Depth = 2,
    show_all: ShowAll = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint of any origin holds. No code in it is executed.

    Of a file, reads its directory and its data.pkl, but no tensor values; of a folder that many ranks wrote,
    its .metadata and the entries that are no tensors. Names that torch.load(weights_only=True) would refuse
    are listed last: load such a checkpoint with weights_only=False only if you trust its author.

    Example: asyncckpt inspect model.pt
    """
    store, file, is_folder = checkpoint_at(path, option)
    rows = None if show_all else ROWS
    if is_folder:
        from asyncckpt.cli.inspecting_folder import folder_document, print_folder

        found = folder_document(store, file.name, depth)
        if not as_json:
            print_folder(found, rows)
    else:
        contents = call(read_file, read_contents, store, file.name)
        found = _document(contents, depth)
        if not as_json:
            _print(contents, found, rows)
    if as_json:
        print_json(found)


def _print(contents: Contents, found: dict[str, Any], rows: int | None) -> None:
    print_header(found)
    _print_tensors(contents, found, rows)
    print_modules(found["modules"], rows)
    print_values(found["values"], rows)
    print_refused(found["refused_by_weights_only"], rows, "torch.load(weights_only=True) refuses this file")


def _document(contents: Contents, depth: int) -> dict[str, Any]:
    """Return the contents as the JSON document."""
    from asyncckpt._inspection.refusals import refused_globals

    summary, checkpoint, records = contents.summary, contents.summary.checkpoint, contents.records
    tensors = [_tensor_row(path, tensor, records) for path, tensor in contents.tensors]
    sizes = {key: stop - start for key, (start, stop) in records.payloads.items()}
    storages: list[dict[str, Any]] = [
        {"key": key, "dtype": dtype_name(storage), "location": storage.location, "nbytes": sizes[key]}
        for storage in contents.storages
        if (key := storage.key) in sizes
    ]
    stored = {"storages": len(storages), "storage_nbytes": sum(row["nbytes"] for row in storages)}
    return {
        "path": checkpoint.path,
        "nbytes": checkpoint.nbytes,
        "written_by": summary.writer,
        "versions": dict(contents.versions),
        "created": checkpoint.created or None,
        "sequence": checkpoint.sequence or None,
        "step": checkpoint.step,
        "epoch": summary.epoch,
        "metrics": dict(checkpoint.metrics),
        "byteorder": records.byteorder,
        "records": records.count,
        "tensors": tensors,
        "storages": storages,
        "total": sums_of(tensors) | stored,
        "modules": modules_of(tensors, depth),
        "values": contents.values,
        "globals": contents.globals,
        "refused_by_weights_only": refused_globals(contents.globals),
    }


def _tensor_row(path: list[Any], tensor: Tensor, records: Records) -> dict[str, Any]:
    from asyncckpt._inspection.tensor_values import nbytes_of

    nbytes = nbytes_of(tensor)
    return {
        "path": path,
        "dtype": dtype_name(tensor),
        "shape": list(tensor.shape),
        "nbytes": nbytes,
        "kind": tensor.kind,
        "requires_grad": tensor.requires_grad,
        "storage": tensor.storage.key,
        "location": tensor.storage.location,
        "offset": tensor.offset,
        "stride": list(tensor.stride),
        "contiguous": tensor.is_contiguous,
        "in_file": nbytes is not None and records.holds(tensor, nbytes // max(tensor.numel, 1)),
    }


def _print_tensors(contents: Contents, found: dict[str, Any], limit: int | None) -> None:
    views: defaultdict[str, list[list[Any]]] = defaultdict(list)
    for path, tensor in contents.tensors:
        views[tensor.storage.key].append(path)
    rows, total = found["tensors"], found["total"]
    if rows:
        table = new_table("tensor", "dtype", "shape", "bytes", "notes", right=("bytes",))
        for (path, tensor), row in zip(contents.tensors[:limit], rows, strict=False):
            notes = ", ".join(_notes(path, tensor, views[tensor.storage.key], fits=row["in_file"]))
            table.add_row(path_text(path), clean(row["dtype"]), shape_text(row), nbytes_text(row), notes)
        print_rows(table, len(rows), limit)
    line(
        f"{counted(total['tensors'], 'tensor')} of {total['elements']:,} elements, {size(total['nbytes'])},"
        f" on {counted(total['storages'], 'storage')} of {size(total['storage_nbytes'])}"
    )


def _notes(path: list[Any], tensor: Tensor, sharing: Sequence[list[Any]], *, fits: bool) -> Iterable[str]:
    if len(sharing) > 1:
        other = next((one for one in sharing if one != path), path)
        more = f" and {len(sharing) - 2} more" if len(sharing) > 2 else ""  # noqa: PLR2004 - itself, the other
        yield f"shares storage with {path_text(other)}{more}"
    if not fits:
        yield "incomplete in the file"
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
