"""`asyncckpt diff`: in what two files differ, without unpickling them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.comparing import ABSENT, compare
from asyncckpt._inspection.comparing_values import Side, compare_values
from asyncckpt._inspection.contents import read_contents
from asyncckpt._inspection.tensor_values import dtype_of
from asyncckpt._outline.texts import clean, path_text, short
from asyncckpt._threads import in_thread
from asyncckpt.cli.locations import StorageOptions, call, file_at, options_for
from asyncckpt.cli.output import AsJson, bytes_progress, counted, line, new_table, number, print_json
from asyncckpt.cli.states import ROWS, ShowAll, json_path, json_value, print_rest, print_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt._inspection.comparing import Comparison, Difference, TensorPair
    from asyncckpt._inspection.value_differences import ValueDifference
    from asyncckpt.stores.base import Store, StoredFile

    _File = tuple[Store, StoredFile]

A = Annotated[str, typer.Argument(metavar="A", show_default=False)]
B = Annotated[str, typer.Argument(metavar="B", show_default=False)]

_DIFFERENT = 1


@dataclass(frozen=True, slots=True)
class _Result:
    """All differences.

    Attributes:
        paths: of the two files.
        comparison: those that the outlines tell.
        changed: the tensors whose values differ, and how much.
        equal: how many tensors have the same values.
        nans: how many elements are NaN in both.
    """

    paths: tuple[str, str]
    comparison: Comparison
    changed: Sequence[tuple[TensorPair, ValueDifference]]
    equal: int
    nans: int

    @property
    def same(self) -> bool:
        return not (self.comparison.differences or self.comparison.sharing or self.changed)


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
    first, second = (file_at(path, options_for(path, (a, b), option)) for path in (a, b))
    result = call(_compared, first, second)
    if as_json:
        print_json(_document(result))
    else:
        _print(result, None if show_all else ROWS)
    if not result.same:
        raise typer.Exit(_DIFFERENT)


async def _compared(a: _File, b: _File) -> _Result:
    async with a[0].open(a[1].name) as file_a, b[0].open(b[1].name) as file_b:
        return await _compare(
            Side(file_a, await read_contents(file_a)), Side(file_b, await read_contents(file_b))
        )


async def _compare(a: Side, b: Side) -> _Result:
    comparison = await in_thread(compare, a.contents.outline.root, b.contents.outline.root)
    pairs = comparison.pairs
    with bytes_progress("comparing", sum(map(_nbytes, pairs))) as advance:
        values = await compare_values(a, b, pairs, advance)
    told = [(pair, value) for pair, value in zip(pairs, values, strict=True) if value is not None]
    changed = [(pair, value) for pair, value in told if value.differing]
    paths = a.contents.summary.checkpoint.path, b.contents.summary.checkpoint.path
    nans = sum(value.nans for _, value in told)
    return _Result(paths, comparison, changed, len(told) - len(changed), nans)


def _nbytes(pair: TensorPair) -> int:
    dtype = dtype_of(pair.a.dtype)
    return pair.a.numel * dtype.itemsize if dtype else 0


def _print(result: _Result, limit: int | None) -> None:
    differences = result.comparison.differences
    if differences:
        table = new_table("entry", "differs in", "A", "B")
        for difference in differences[:limit]:
            table.add_row(path_text(difference.path) or "(all)", difference.what, *_texts(difference))
        print_rows(table, len(differences), limit)
        line("")
    if result.changed:
        table = new_table(
            "tensor", "differing", "elements", "max |A-B|", "|A-B| / |A|",
            right=("differing", "elements", "max |A-B|", "|A-B| / |A|"),
        )  # fmt: skip
        for pair, value in result.changed[:limit]:
            counts = f"{value.differing:,}", f"{value.numel:,}"
            table.add_row(path_text(pair.path), *counts, _number(value.largest), _number(value.relative))
        print_rows(table, len(result.changed), limit)
        line("")
    sharing = result.comparison.sharing
    for shared in sharing[:limit]:
        names = [path_text(path) for path in shared.paths[:limit]]
        more = f" and {len(shared.paths) - len(names)} more" if len(shared.paths) > len(names) else ""
        line(f"share memory in {shared.shared_in} only: {', '.join(names)}{more}")
    print_rest(len(sharing), limit)
    _print_end(result)


def _print_end(result: _Result) -> None:
    line("the same" if result.same else "different", "green" if result.same else "red")
    line(f"{counted(result.equal, 'tensor')} equal, {len(result.changed)} with other values")
    if result.nans:
        line(f"{counted(result.nans, 'element')} NaN in both, which is equal here")


def _texts(difference: Difference) -> tuple[str, str]:
    """Return what stands in the columns of A and B."""
    if difference.what in {"kind", "dtype"}:
        return clean(difference.a), clean(difference.b)
    return _text(difference.a), _text(difference.b)


def _text(entry: Any) -> str:
    return "-" if entry is ABSENT else short(entry)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _document(result: _Result) -> dict[str, Any]:
    """Return all of it for --json."""
    return {
        "a": result.paths[0],
        "b": result.paths[1],
        "same": result.same,
        "differences": [_row(difference) for difference in result.comparison.differences],
        "tensors": [
            {
                "path": json_path(pair.path),
                "elements": value.numel,
                "differing": value.differing,
                "max_abs": value.largest,
                "relative": value.relative,
            }
            for pair, value in result.changed
        ],
        "equal_tensors": result.equal,
        "nans_in_both": result.nans,
        "sharing": [
            {"shared_in": shared.shared_in, "paths": [json_path(path) for path in shared.paths]}
            for shared in result.comparison.sharing
        ],
    }


def _row(difference: Difference) -> dict[str, Any]:
    sides = {
        name: json_value(list(entry) if difference.what == "shape" else entry)
        for name, entry in (("a", difference.a), ("b", difference.b))
        if entry is not ABSENT
    }
    return {"path": json_path(difference.path), "what": difference.what, **sides}
