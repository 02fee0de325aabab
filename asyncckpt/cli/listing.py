"""`asyncckpt ls`: the checkpoints of a directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.texts import clean
from asyncckpt.cli import output
from asyncckpt.cli.formats import dcp_files, is_dcp, looks_like_checkpoint
from asyncckpt.cli.locations import (
    Directory,
    Recursive,
    StorageOptions,
    call,
    nested_hint,
    store_at,
    stores_at,
)
from asyncckpt.cli.series import by_series, metric_names, parse_metric, require_metric, series_text
from asyncckpt.errors import CorruptCheckpointError, StoreError
from asyncckpt.retention import rank
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.retention import Mode
    from asyncckpt.stores.base import Store, StoredFile

    Ranking = tuple[str, Mode] | None

Best = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC[:min|max]",
        help="Metric that ranks the checkpoints; lower is better unless :max is added.",
    ),
]

# More metrics than this are named below the table.
_METRIC_COLUMNS = 4


@dataclass(slots=True)
class _Row:
    name: str
    checkpoint: Checkpoint  # `created` is the time of the snapshot, else of the last change, or 0.0
    writer: str | None = None
    epoch: int | None = None
    error: str | None = None  # why it cannot be read
    series: str = ""  # if the directory has several
    newest: bool = False
    best: bool = False


def ls(
    directory: Directory,
    *,
    best: Best = None,
    recursive: Recursive = False,
    option: StorageOptions = None,
    as_json: output.AsJson = False,
) -> None:
    """List the checkpoints of a directory, and mark the newest and the best of each series.

    Reads files of asyncckpt, Lightning and torch.save, without unpickling them. A file that looks like a
    checkpoint but cannot be read is listed as `damaged?`. A series is the checkpoints of one filename
    template; files of no series are marked only if there is no series.

    Example: asyncckpt ls runs/gpt --best val_loss
    """
    found = {}
    for store in stores_at(directory, option, recursive=recursive):
        rows = call(_read, store)
        if rows:
            found[store.path_of("").rstrip("/")] = sorted(rows, key=_order)
    ranking = None if best is None else parse_metric(best)
    good = [row.checkpoint for rows in found.values() for row in rows if row.error is None]
    if ranking is not None and good:
        require_metric(ranking[0], good, "--best")
    rankings = {place: _mark(rows, ranking) for place, rows in found.items()}
    if as_json:
        output.print_json([_as_json(row) for rows in found.values() for row in rows])
        return
    for place, rows in found.items():
        if recursive:
            output.line(place, "bold")
        _print_table(rows)
        _print_captions(rows, rankings[place])
    if not found:
        output.line(
            f"there are no checkpoints in {directory}{'' if recursive else _instead(directory, option)}"
        )


def _instead(directory: str, option: Sequence[str] | None) -> str:
    """Return other contents of a directory without checkpoints, as the end of a message."""
    if dcp_files(call(store_at(directory, option).list)):
        return "; it is a checkpoint of torch.distributed.checkpoint, which dcp.load reads"
    return nested_hint(directory, option)


async def _read(store: Store) -> list[_Row]:
    from asyncckpt._loading.catalog import READERS
    from asyncckpt._threads import for_each

    files = [file for file in await store.list() if not is_dcp(file.name)]
    rows = await for_each(partial(_row, store), files, READERS)
    return [row for row in rows if row is not None]


async def _row(store: Store, file: StoredFile) -> _Row | None:
    """Return the row of a file; None if it is not a checkpoint, or was removed since the listing."""
    from asyncckpt._inspection.contents import summarize

    try:
        async with store.open(file.name) as opened:
            summary = await summarize(opened)
    except FileNotFoundError:
        return None
    except (CorruptCheckpointError, StoreError) as error:
        if not await looks_like_checkpoint(store, file):
            return None
        unread = Checkpoint(None, store.path_of(file.name), {}, file.nbytes, file.modified)
        return _Row(file.name, unread, error=output.message(error))
    checkpoint = replace(summary.checkpoint, created=summary.checkpoint.created or file.modified)
    return _Row(file.name, checkpoint, summary.writer, summary.epoch)


def _order(row: _Row) -> tuple[bool, int, float, str]:
    """Sort in order of commit, unreadable files last."""
    return row.error is not None, row.checkpoint.sequence, row.checkpoint.created, row.name


def _mark(rows: Sequence[_Row], ranking: Ranking) -> Ranking:
    """Mark the newest and the best of each series; return metric and mode of "best", if known."""
    good = {row.checkpoint.path: row for row in rows if row.error is None}
    checkpoints = [row.checkpoint for row in good.values()]
    if ranking is None and len(metrics := metric_names(checkpoints)) == 1:
        ranking = metrics[0], "min"
    series = by_series(checkpoints) or {None: checkpoints}
    for key, own in series.items():
        for checkpoint in own if len(series) > 1 else ():
            good[checkpoint.path].series = series_text(key)
        # Without sequence numbers, all times have to be known.
        if own and (own[-1].sequence or all(checkpoint.created for checkpoint in own)):
            good[own[-1].path].newest = True
        for checkpoint in rank(own, *ranking)[:1] if ranking else ():
            good[checkpoint.path].best = True
    return ranking


def _as_json(row: _Row) -> dict[str, Any]:
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
        "newest": row.newest,
        "best": row.best,
        "error": row.error,
    }


def _print_table(rows: Sequence[_Row]) -> None:
    epochs = ["epoch"] if any(row.epoch is not None for row in rows) else []
    series = ["series"] if any(row.series for row in rows) else []
    metrics = _metrics(rows)[:_METRIC_COLUMNS]
    numbers = ["step", *epochs, *metrics, "size", "age"]
    table = output.new_table("name", *series, *numbers, "", right=numbers)
    now = time.time()
    for row in rows:
        checkpoint = row.checkpoint
        values = [checkpoint.step, *(row.epoch for _ in epochs), *map(checkpoint.metrics.get, metrics)]
        marks = {"newest": row.newest, "best": row.best, "damaged?": row.error is not None}
        table.add_row(
            clean(row.name),
            *(row.series for _ in series),
            *("" if value is None else output.number(value) for value in values),
            output.size(checkpoint.nbytes),
            output.age(now - checkpoint.created) if checkpoint.created else "",
            ", ".join(mark for mark, applies in marks.items() if applies),
            style="red" if row.error else None,
        )
    output.print_table(table)


def _print_captions(rows: Sequence[_Row], ranking: Ranking) -> None:
    unread = [row.error for row in rows if row.error is not None]
    for error in unread:
        output.line(f"damaged? {error}", "red")
    among = f"; {len(unread)} cannot be read" if unread else ""
    total = output.size(sum(row.checkpoint.nbytes for row in rows))
    output.line(f"{output.counted(len(rows), 'checkpoint')}, {total}{among}", "dim")
    metrics = _metrics(rows)
    if ranking is not None:
        metric, mode = ranking
        this, other, opposite = (
            ("highest", "min", "lowest") if mode == "max" else ("lowest", "max", "highest")
        )
        of_each = ", of each series" if any(row.series for row in rows) else ""
        output.line(f"best: {this} {metric} (--best {metric}:{other} for the {opposite}){of_each}", "dim")
    elif metrics:
        output.line(
            f"best: not shown; choose with --best METRIC[:min|max], one of {', '.join(metrics)}", "dim"
        )
    if folded := metrics[_METRIC_COLUMNS:]:
        output.line(f"not shown: {', '.join(folded)} (--json has all)", "dim")


def _metrics(rows: Sequence[_Row]) -> list[str]:
    return metric_names(row.checkpoint for row in rows if row.error is None)
