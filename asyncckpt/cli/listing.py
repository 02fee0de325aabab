"""`asyncckpt ls`: the checkpoints of a directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.contents import summarize
from asyncckpt._inspection.texts import clean
from asyncckpt._loading.catalog import READERS
from asyncckpt._saving.engine import get_engine
from asyncckpt._threads import for_each
from asyncckpt.cli.by_series import by_series, series_text
from asyncckpt.cli.directories import Recursive, nested_hint, stores_at
from asyncckpt.cli.formats import dcp_files, is_dcp, looks_like_checkpoint
from asyncckpt.cli.locations import Directory, StorageOptions, store_at
from asyncckpt.cli.output import (
    AsJson,
    age,
    counted,
    line,
    message,
    new_table,
    number,
    print_json,
    print_table,
    size,
)
from asyncckpt.cli.policies import metric_names, parse_metric, require_metric
from asyncckpt.errors import CorruptCheckpointError, StoreError
from asyncckpt.retention import rank
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from asyncckpt.retention import Mode
    from asyncckpt.stores.base import Store, StoredFile

Best = Annotated[
    str | None,
    typer.Option(metavar="METRIC[:min|max]", help="Mark the best by this metric; lower is better, or :max."),
]

# More metrics than this are named below the table.
_METRIC_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class _Row:
    """A file as it is listed.

    Attributes:
        name: of the file.
        checkpoint: what it is; `created` is the time of the snapshot if the file tells, else of its last
            change, or 0.0 if nobody does.
        writer, epoch: what else it tells.
        error: why it cannot be read.
    """

    name: str
    checkpoint: Checkpoint
    writer: str | None = None
    epoch: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Listing:
    """What there is in a directory.

    Attributes:
        rows: in order of commit; those that cannot be read last.
        metrics: names of all.
        ranking: what "best" means, if that is known.
        series: of each path, if there are several.
        best, newest: paths, one of each series.
    """

    rows: Sequence[_Row]
    metrics: Sequence[str]
    ranking: tuple[str, Mode] | None
    series: Mapping[str, str]
    best: Collection[str]
    newest: Collection[str]


def ls(
    directory: Directory,
    *,
    best: Best = None,
    recursive: Recursive = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a directory: what each one tells, the newest and the best of each series.

    Those of asyncckpt, Lightning and torch.save; nothing is unpickled. What looks like a checkpoint but
    cannot be read as one is listed as `damaged?`. A series are the checkpoints of one filename template; what
    is of none is marked only where there is no series.

    Example: asyncckpt ls runs/gpt --best val_loss
    """
    found = {}
    for store in stores_at(directory, option, recursive=recursive):
        rows = get_engine().call(_read, store)
        if rows:
            found[store.path_of("").rstrip("/")] = rows
    listings = _listings(found, best)
    if as_json:
        print_json([_as_json(row, listing) for listing in listings.values() for row in listing.rows])
        return
    for place, listing in listings.items():
        if recursive:
            line(place, "bold")
        _print_table(listing)
        _print_captions(listing)
    if not listings:
        line(f"there are no checkpoints in {directory}{_instead(directory, option, recursive=recursive)}")


def _instead(directory: str, option: Sequence[str] | None, *, recursive: bool) -> str:
    """Return what there is where no checkpoint is, to be appended to a message."""
    if recursive:
        return ""
    if dcp_files(get_engine().call(store_at(directory, option).list)):
        return ", which is one of torch.distributed.checkpoint: its dcp.load reads it"
    return nested_hint(directory, option)


async def _read(store: Store) -> list[_Row]:
    files = [file for file in await store.list() if not is_dcp(file.name)]
    rows = await for_each(partial(_row, store), files, READERS)
    return [row for row in rows if row is not None]


async def _row(store: Store, file: StoredFile) -> _Row | None:
    """Return the row of a file; None if it is no checkpoint, or was removed since it was listed."""
    path = store.path_of(file.name)
    try:
        async with store.open(file.name) as opened:
            summary = await summarize(opened)
    except FileNotFoundError:
        return None
    except (CorruptCheckpointError, StoreError) as error:
        if not await looks_like_checkpoint(store, file):
            return None
        return _Row(file.name, Checkpoint(None, path, {}, file.nbytes, file.modified), error=message(error))
    checkpoint = replace(summary.checkpoint, created=summary.checkpoint.created or file.modified)
    return _Row(file.name, checkpoint, summary.writer, summary.epoch)


def _listings(found: Mapping[str, Sequence[_Row]], best: str | None) -> dict[str, _Listing]:
    good = [row.checkpoint for rows in found.values() for row in rows if row.error is None]
    ranking: tuple[str, Mode] | None = None
    if best is not None and good:
        ranking = parse_metric(best)
        require_metric(ranking[0], good, "--best")
    return {place: _listing(rows, ranking) for place, rows in found.items()}


def _listing(rows: Sequence[_Row], ranking: tuple[str, Mode] | None) -> _Listing:
    ordered = sorted(rows, key=_order)
    good = [row.checkpoint for row in ordered if row.error is None]
    metrics = metric_names(good)
    if ranking is None and len(metrics) == 1:
        ranking = metrics[0], "min"
    series = by_series(good) or {None: good}
    ranked = [rank(checkpoints, *ranking)[:1] for checkpoints in series.values()] if ranking else []
    return _Listing(
        ordered,
        metrics,
        ranking,
        {c.path: series_text(key) for key, own in series.items() for c in own} if len(series) > 1 else {},
        {checkpoint.path for best in ranked for checkpoint in best},
        {own[-1].path for own in series.values() if _tells_order(own)},
    )


def _order(row: _Row) -> tuple[bool, int, float, str]:
    return row.error is not None, row.checkpoint.sequence, row.checkpoint.created, row.name


def _tells_order(ordered: Sequence[Checkpoint]) -> bool:
    """Tell whether it is known which of the checkpoints was committed last."""
    return bool(ordered) and (ordered[-1].sequence > 0 or all(c.created for c in ordered))


def _as_json(row: _Row, listing: _Listing) -> dict[str, Any]:
    checkpoint = row.checkpoint
    return {
        "name": row.name,
        "path": checkpoint.path,
        "writer": row.writer,
        "series": checkpoint.filename,
        "step": checkpoint.step,
        "epoch": row.epoch,
        "metrics": dict(checkpoint.metrics),
        "nbytes": checkpoint.nbytes,
        "created": checkpoint.created or None,
        "newest": checkpoint.path in listing.newest,
        "best": checkpoint.path in listing.best,
        "error": row.error,
    }


def _print_table(listing: _Listing) -> None:
    epochs = ["epoch"] if any(row.epoch is not None for row in listing.rows) else []
    metrics = listing.metrics[:_METRIC_COLUMNS]
    numbers = ["step", *epochs, *metrics, "size", "age"]
    series = ["series"] if listing.series else []
    table = new_table("name", *series, *numbers, "", right=numbers)
    now = time.time()
    for row in listing.rows:
        checkpoint = row.checkpoint
        table.add_row(
            clean(row.name),
            *([clean(listing.series.get(checkpoint.path, ""))] if series else []),
            _text(checkpoint.step),
            *([_text(row.epoch)] if epochs else []),
            *(_text(checkpoint.metrics.get(name)) for name in metrics),
            size(checkpoint.nbytes),
            age(now - checkpoint.created) if checkpoint.created else "",
            _marks(row, listing),
            style="red" if row.error else None,
        )
    print_table(table)


def _print_captions(listing: _Listing) -> None:
    unread = [row.error for row in listing.rows if row.error is not None]
    for error in unread:
        line(f"damaged? {error}", "red")
    total = sum(row.checkpoint.nbytes for row in listing.rows)
    among = f"; {len(unread)} cannot be read" if unread else ""
    line(f"{counted(len(listing.rows), 'checkpoint')}, {size(total)}{among}", "dim")
    if listing.ranking is not None:
        of_each = ", of each series" if listing.series else ""
        line(_best_caption(*listing.ranking) + of_each, "dim")
    elif listing.metrics:
        line(f"best: give --best METRIC[:min|max], with one of {', '.join(listing.metrics)}", "dim")
    folded = listing.metrics[_METRIC_COLUMNS:]
    if folded:
        line(f"not shown: {', '.join(folded)} (--json has all)", "dim")


def _best_caption(metric: str, mode: Mode) -> str:
    if mode == "max":
        return f"best: highest {metric} (--best {metric}:min for the lowest)"
    return f"best: lowest {metric} (--best {metric}:max for the highest)"


def _text(value: float | None) -> str:
    return "" if value is None else number(value)


def _marks(row: _Row, listing: _Listing) -> str:
    path = row.checkpoint.path
    marks = {
        "newest": path in listing.newest,
        "best": path in listing.best,
        "damaged?": row.error is not None,
    }
    return ", ".join(mark for mark, applies in marks.items() if applies)
