"""`asyncckpt diff`: the differences of two checkpoints, without unpickling them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import decoded_tensor
from asyncckpt._inspection.isolation import look_at
from asyncckpt._inspection.texts import clean, path_text
from asyncckpt.cli.locations import StorageOptions, call, checkpoint_at, is_url, options_for
from asyncckpt.cli.output import AsJson, bytes_progress, counted, line, new_table, number, print_json
from asyncckpt.cli.states import ROWS, ShowAll, print_rest, print_rows, value_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.cli.sides import Compared

A = Annotated[str, typer.Argument(metavar="A", show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", show_default=False)]

_DIFFERENT = 1


def diff(
    a: A, b: B, *, show_all: ShowAll = False, option: StorageOptions = None, as_json: AsJson = False
) -> None:
    """Compare two checkpoints. No code in them is executed.

    Compares entries, plain values, shapes, dtypes, all tensor elements, and which tensors share memory.
    Ignores devices, strides, requires_grad, and the difference between dict and OrderedDict. NaN equals NaN;
    keys that are objects are equal if they print alike. Folders, saved by any numbers of ranks, are compared
    tensor by tensor, with each other or with a file; then keys are compared as texts, as such folders have
    them, and shared memory is ignored, which they do not keep. Memory use does not grow with the tensors;
    remote files are copied to temporary ones first. Exit status: 0 if the checkpoints are equal, 1 if they
    differ, 2 if they could not be compared.

    Example: asyncckpt diff step-00000100.pt step-00000200.pt
    """
    sides = [_side(path, options_for(path, (a, b), option)) for path in (a, b)]
    found = _document(*sides)
    if as_json:
        print_json(found)
    else:
        _print(found, None if show_all else ROWS)
    if not found["same"]:
        raise typer.Exit(_DIFFERENT)


def _side(path: str, options: Sequence[str] | None) -> Compared:
    from asyncckpt.cli.sides import open_compared

    store, file, is_folder = checkpoint_at(path, options)
    nbytes = 0
    if is_url(path):
        files = call(store.folder(file.name).list) if is_folder else [file]
        nbytes = sum(file.nbytes for file in files)
    with bytes_progress(f"reading {path}", nbytes) as advance:
        return call(partial(open_compared, store, file.name, advance, is_folder=is_folder))


def _document(a: Compared, b: Compared) -> dict[str, Any]:
    """Return the comparison as the JSON document."""
    from asyncckpt._inspection.parts import compare_parts
    from asyncckpt._inspection.tensor_values import nbytes_of

    found = look_at("differences", [*a.pickles, *b.pickles], [a.entries, b.entries])
    pairs = [(path, decoded_tensor(in_a), decoded_tensor(in_b)) for path, in_a, in_b in found["pairs"]]
    values = []
    with bytes_progress("comparing", sum(nbytes_of(tensor) or 0 for _, tensor, _ in pairs)) as advance:
        for path, in_a, in_b in pairs:
            values.append((path, compare_parts(a.parts(in_a), b.parts(in_b))))
            advance(nbytes_of(in_a) or 0)
    known = [(path, value) for path, value in values if value is not None]
    changed = [
        {
            "path": path,
            "elements": value.numel,
            "differing": value.differing,
            "max_abs": value.largest,
            "relative": value.relative,
        }
        for path, value in known
        if value.differing
    ]
    return {
        "a": a.path,
        "b": b.path,
        "same": not (found["differences"] or found["sharing"] or changed),
        "differences": found["differences"],
        "tensors": changed,
        "equal_tensors": len(known) - len(changed),
        "nans_in_both": sum(value.nans for _, value in known),
        "sharing": found["sharing"],
    }


def _print(found: dict[str, Any], limit: int | None) -> None:
    differences, changed, sharing = found["differences"], found["tensors"], found["sharing"]
    if differences:
        table = new_table("entry", "differs in", "A", "B")
        for row in differences[:limit]:
            table.add_row(path_text(row["path"]) or "(all)", row["what"], *_texts(row))
        print_rows(table, len(differences), limit)
        line("")
    if changed:
        numbers = ("differing", "elements", "max |A-B|", "|A-B| / |A|")
        table = new_table("tensor", *numbers, right=numbers)
        for row in changed[:limit]:
            sizes = ("-" if row[name] is None else number(row[name]) for name in ("max_abs", "relative"))
            table.add_row(path_text(row["path"]), f"{row['differing']:,}", f"{row['elements']:,}", *sizes)
        print_rows(table, len(changed), limit)
        line("")
    for row in sharing[:limit]:
        names, left = map(path_text, row["paths"][:limit]), len(row["paths"][limit:] if limit else ())
        more = f" and {left} more" if left else ""
        line(f"share memory in {row['shared_in']} only: {', '.join(names)}{more}")
    print_rest(len(sharing), limit)
    line("the same" if found["same"] else "different", "green" if found["same"] else "red")
    line(f"{counted(found['equal_tensors'], 'tensor')} equal, {len(changed)} different")
    if found["nans_in_both"]:
        line(f"{counted(found['nans_in_both'], 'element')} NaN in both files (counted as equal)")


def _texts(row: dict[str, Any]) -> list[str]:
    """Return the texts of columns A and B."""
    sides = [row.get(side) for side in ("a", "b")]
    if row["what"] in {"kind", "dtype"}:
        return [clean(side["value"]) for side in sides if side]
    if row["what"] == "shape":
        return [str(tuple(side["value"])) for side in sides if side]
    return ["-" if side is None else value_text(side) for side in sides]
