"""`asyncckpt inspect`: the contents of a file, without unpickling it."""

from __future__ import annotations

import sys
from collections import defaultdict
from datetime import datetime
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import read_contents
from asyncckpt._inspection.inert import dtype_name
from asyncckpt._inspection.texts import clean, key_text, path_text
from asyncckpt._loading.reader import read_file
from asyncckpt.cli.locations import StorageOptions, call, file_at
from asyncckpt.cli.output import AsJson, counted, line, new_table, number, print_json, size
from asyncckpt.cli.states import ROWS, ShowAll, print_rest, print_rows, value_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asyncckpt._inspection.contents import Contents, Records
    from asyncckpt._inspection.inert import Tensor

File = Annotated[str, typer.Argument(metavar="FILE", show_default=False)]
Depth = Annotated[
    int, typer.Option(min=0, help="Levels of modules in the summary, below the top-level entries.")
]

_VALUE_WIDTH = 80


def inspect(
    file: File,
    *,
    depth: Depth = 2,
    show_all: ShowAll = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint of any origin holds. No code in it is executed.

    Reads the file's directory and its data.pkl, but no tensor values. Names that
    torch.load(weights_only=True) would refuse are listed last: load such a file with weights_only=False only
    if you trust its author.

    Example: asyncckpt inspect model.pt
    """
    store, there = file_at(file, option)
    contents = call(read_file, read_contents, store, there.name)
    found = _document(contents, depth)
    if as_json:
        print_json(found)
        return
    rows = None if show_all else ROWS
    _print_header(found)
    _print_tensors(contents, found, rows)
    _print_modules(found["modules"], rows)
    _print_values(found["values"], rows)
    _print_refused(found["refused_by_weights_only"], rows)


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
        "total": _sum(tensors) | stored,
        "modules": _modules(tensors, depth),
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


def _modules(tensors: Sequence[dict[str, Any]], depth: int) -> list[dict[str, Any]]:
    """Return sums for each prefix of names, such as ["model", "layers", "0"], in order.

    Args:
        tensors: their rows.
        depth: how many levels below the entries of the state itself.
    """
    modules: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in tensors:
        # A state dict has the names of modules in its keys, with dots between them.
        keys = (clean(key) if isinstance(key, str) else key_text(key) for key in row["path"][: depth + 2])
        names = [name for key in keys for name in key.split(".")]
        for length in range(1, min(len(names) - 1, depth + 1) + 1):
            modules.setdefault(tuple(names[:length]), []).append(row)
    return [{"path": list(names), **_sum(rows)} for names, rows in modules.items()]


def _sum(tensors: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "tensors": len(tensors),
        "elements": sum(prod(row["shape"]) for row in tensors),
        "nbytes": sum(row["nbytes"] or 0 for row in tensors),
    }


def _print_header(found: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    facts = {
        "written by": found["written_by"] + (f" ({versions})" if versions else ""),
        "created": _moment(found["created"]) if found["created"] else None,
        "step": found["step"],
        "epoch": found["epoch"],
        "metrics": ", ".join(f"{name} {number(value)}" for name, value in found["metrics"].items()),
        "byte order": None if found["byteorder"] == sys.byteorder else found["byteorder"],
    }
    line(f"{found['path']}  {size(found['nbytes'])} ({found['nbytes']:,} bytes)", "bold")
    for name, value in facts.items():
        if value not in {None, ""}:
            line(f"  {name:<10}  {value}")


def _print_tensors(contents: Contents, found: dict[str, Any], limit: int | None) -> None:
    views: defaultdict[str, list[list[Any]]] = defaultdict(list)
    for path, tensor in contents.tensors:
        views[tensor.storage.key].append(path)
    rows, total = found["tensors"], found["total"]
    if rows:
        table = new_table("tensor", "dtype", "shape", "bytes", "notes", right=("bytes",))
        for (path, tensor), row in zip(contents.tensors[:limit], rows, strict=False):
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            nbytes = "?" if row["nbytes"] is None else size(row["nbytes"])
            notes = ", ".join(_notes(path, tensor, views[tensor.storage.key], fits=row["in_file"]))
            table.add_row(path_text(path), clean(row["dtype"]), shape, nbytes, notes)
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


def _print_modules(modules: Sequence[dict[str, Any]], limit: int | None) -> None:
    if not modules:
        return
    table = new_table("module", "tensors", "elements", "bytes", right=("tensors", "elements", "bytes"))
    for row in modules[:limit]:
        label = "  " * (len(row["path"]) - 1) + key_text(row["path"][-1])
        table.add_row(label, str(row["tensors"]), f"{row['elements']:,}", size(row["nbytes"]))
    line("")
    print_rows(table, len(modules), limit)


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
        line("torch.load(weights_only=True) refuses this file because of:", "red")
        for name in refused[:limit]:
            line(f"  {name}", "red")
        print_rest(len(refused), limit)
        line("weights_only=False executes them: use it only if you trust the author of the file.")


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # not a valid time
        return f"{seconds} seconds since the epoch"
