"""`asyncckpt diff`: in what two files differ, without unpickling them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import decoded_tensor
from asyncckpt._inspection.inert import clean, dtype_name, path_text
from asyncckpt._inspection.isolation import look_at
from asyncckpt._saving.engine import get_engine
from asyncckpt.cli.locations import StorageOptions, file_at, is_url, options_for
from asyncckpt.cli.output import AsJson, bytes_progress, counted, line, new_table, number, print_json
from asyncckpt.cli.states import ROWS, ShowAll, print_rest, print_rows, value_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt._inspection.tensor_values import Side, ValueDifference

A = Annotated[str, typer.Argument(metavar="A", show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", show_default=False)]

_DIFFERENT = 1


@dataclass(slots=True)
class _Result:
    """All differences.

    Attributes:
        paths: of the two files.
        differences, sharing: as --json prints them.
        changed: paths of the tensors whose values differ, and how much.
        equal: how many tensors have the same values.
        nans: how many elements are NaN in both.
    """

    paths: tuple[str, str]
    differences: list[dict[str, Any]]
    sharing: list[dict[str, Any]]
    changed: list[tuple[list[Any], ValueDifference]] = field(default_factory=list)
    equal: int = 0
    nans: int = 0

    @property
    def same(self) -> bool:
        return not (self.differences or self.sharing or self.changed)


def diff(
    a: A, b: B, *, show_all: ShowAll = False, option: StorageOptions = None, as_json: AsJson = False
) -> None:
    """Tell in what two checkpoints differ, without unpickling them.

    This compares the entries of the states, plain values, shapes, dtypes, every element of the tensors, and
    which tensors share memory; not where tensors were, their strides, whether they require gradients, nor
    whether a dict is an OrderedDict. NaN is equal to NaN, and keys that are objects are the same if they
    print alike. Tensors of any size are compared in little memory. The exit status is 0 if the files hold
    the same, 1 if they differ, 2 if they could not be compared.

    Example: asyncckpt diff step-00000100.pt step-00000200.pt
    """
    sides = [_side(path, options_for(path, (a, b), option)) for path in (a, b)]
    result = _compared(*sides)
    if as_json:
        print_json(_document(result))
    else:
        _print(result, None if show_all else ROWS)
    if not result.same:
        raise typer.Exit(_DIFFERENT)


def _side(path: str, options: Sequence[str] | None) -> Side:
    from asyncckpt._inspection.tensor_values import open_side  # noqa: PLC0415 - torch takes a second

    store, file = file_at(path, options)
    with bytes_progress(f"reading {path}", file.nbytes if is_url(path) else 0) as advance:
        return get_engine().call(open_side, store, file.name, advance)


def _compared(a: Side, b: Side) -> _Result:
    from asyncckpt._inspection.tensor_values import compare_values, dtype_of  # noqa: PLC0415

    paths = a.records.path, b.records.path
    found = look_at("differences", [(side.records.path, side.records.pickle) for side in (a, b)])
    result = _Result(paths, found["differences"], found["sharing"])
    pairs = [(path, *map(decoded_tensor, tensors)) for path, *tensors in found["pairs"]]
    dtypes = [dtype_of(dtype_name(tensor)) for _, tensor, _ in pairs]
    sizes = [
        dtype.itemsize * pair[1].numel if dtype else 0 for dtype, pair in zip(dtypes, pairs, strict=True)
    ]
    with bytes_progress("comparing", sum(sizes)) as advance:
        for (path, in_a, in_b), nbytes in zip(pairs, sizes, strict=True):
            value = compare_values(a, b, in_a, in_b)
            if value is not None:
                result.nans += value.nans
                if value.differing:
                    result.changed.append((path, value))
                else:
                    result.equal += 1
            advance(nbytes)
    return result


def _print(result: _Result, limit: int | None) -> None:
    if result.differences:
        table = new_table("entry", "differs in", "A", "B")
        for row in result.differences[:limit]:
            table.add_row(path_text(row["path"]) or "(all)", row["what"], *_texts(row))
        print_rows(table, len(result.differences), limit)
        line("")
    if result.changed:
        table = new_table(
            "tensor", "differing", "elements", "max |A-B|", "|A-B| / |A|",
            right=("differing", "elements", "max |A-B|", "|A-B| / |A|"),
        )  # fmt: skip
        for path, value in result.changed[:limit]:
            counts = f"{value.differing:,}", f"{value.numel:,}"
            table.add_row(path_text(path), *counts, _number(value.largest), _number(value.relative))
        print_rows(table, len(result.changed), limit)
        line("")
    for shared in result.sharing[:limit]:
        names, left = map(path_text, shared["paths"][:limit]), len(shared["paths"][limit:] if limit else ())
        more = f" and {left} more" if left else ""
        line(f"share memory in {shared['shared_in']} only: {', '.join(names)}{more}")
    print_rest(len(result.sharing), limit)
    _print_end(result)


def _print_end(result: _Result) -> None:
    line("the same" if result.same else "different", "green" if result.same else "red")
    line(f"{counted(result.equal, 'tensor')} equal, {len(result.changed)} with other values")
    if result.nans:
        line(f"{counted(result.nans, 'element')} NaN in both, which is equal here")


def _texts(row: dict[str, Any]) -> list[str]:
    """Return what stands in the columns of A and B."""
    sides = [row.get(side) for side in ("a", "b")]
    if row["what"] in {"kind", "dtype"}:
        return [clean(side["value"]) for side in sides if side]
    if row["what"] == "shape":
        return [str(tuple(side["value"])) for side in sides if side]
    return ["-" if side is None else value_text(side) for side in sides]


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _document(result: _Result) -> dict[str, Any]:
    """Return all of it for --json."""
    return {
        "a": result.paths[0],
        "b": result.paths[1],
        "same": result.same,
        "differences": result.differences,
        "tensors": [
            {
                "path": path,
                "elements": value.numel,
                "differing": value.differing,
                "max_abs": value.largest,
                "relative": value.relative,
            }
            for path, value in result.changed
        ],
        "equal_tensors": result.equal,
        "nans_in_both": result.nans,
        "sharing": result.sharing,
    }
