"""`asyncckpt ls`: the checkpoints of a directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt.cli import output
from asyncckpt.cli.formats import DCP, INCOMPLETE, has_data_files, is_data_file, looks_like_checkpoint
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
from asyncckpt.stores.base import FOLDER_MARK
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

# What to do with folders of stock DCP.
_ADVICE = "asyncckpt.load reads them; after `asyncckpt adopt` a Checkpointer continues with them"
# More metrics than this are named below the table.
_METRIC_COLUMNS = 4


@dataclass(slots=True)
class _Row:
    name: str
    checkpoint: Checkpoint  # `created` is the time of the snapshot, else of the last change, or 0.0
    is_folder: bool = False
    writer: str | None = None
    epoch: int | None = None
    ranks: int | None = None  # how many wrote a folder
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

    Reads files of asyncckpt, Lightning and torch.save, and folders of asyncckpt and
    torch.distributed.checkpoint, without unpickling them. What looks like a checkpoint but cannot be read is
    listed as `damaged?`. A series is the checkpoints of one filename template; checkpoints of no series are
    marked only if there is no series.

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
    listed = call(store_at(directory, option).list)
    if any(file.name == FOLDER_MARK for file in listed):
        return f"; it is one itself: asyncckpt inspect {directory}"
    return f"; it is {INCOMPLETE}" if has_data_files(listed) else nested_hint(directory, option)


async def _read(store: Store) -> list[_Row]:
    from asyncckpt._loading.catalog import READERS
    from asyncckpt._threads import for_each

    files = [file for file in await store.list() if not is_data_file(file.name)]
    rows = await for_each(partial(_row, store), files, READERS)
    rows += await for_each(partial(_folder_row, store), await store.list_folders(), READERS)
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
        return _unread(store, file, output.message(error))
    checkpoint = replace(summary.checkpoint, created=summary.checkpoint.created or file.modified)
    return _Row(file.name, checkpoint, writer=summary.writer, epoch=summary.epoch)


async def _folder_row(store: Store, folder: StoredFile) -> _Row | None:
    """Return the row of a folder; None if it was removed since the listing."""
    from asyncckpt.layout.description import checkpoint_of
    from asyncckpt.layout.folder_mark import read_mark

    path, files = store.path_of(folder.name), store.folder(folder.name)
    try:
        async with files.open(FOLDER_MARK) as mark:
            description = await mark.answer(read_mark(mark.file.nbytes))
        if description is None:
            nbytes = sum(file.nbytes for file in await files.list())
            checkpoint = Checkpoint(None, path, {}, nbytes, folder.modified)
            return _Row(folder.name, checkpoint, is_folder=True, writer=DCP)
    except FileNotFoundError:
        return None
    except CorruptCheckpointError as error:
        return _unread(store, folder, f"{path}: {error}", is_folder=True)
    except StoreError as error:
        return _unread(store, folder, output.message(error), is_folder=True)
    checkpoint = checkpoint_of(path, description, description.nbytes or 0)
    return _Row(folder.name, checkpoint, is_folder=True, writer="asyncckpt", ranks=description.ranks)


def _unread(store: Store, file: StoredFile, error: str, *, is_folder: bool = False) -> _Row:
    unread = Checkpoint(None, store.path_of(file.name), {}, file.nbytes, file.modified)
    return _Row(file.name, unread, is_folder=is_folder, error=error)


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
        "folder": row.is_folder,
        "ranks": row.ranks,
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
    ranks = ["ranks"] if any(row.ranks is not None for row in rows) else []
    numbers = ["step", *epochs, *metrics, *ranks, "size", "age"]
    table = output.new_table("name", *series, *numbers, "", right=numbers)
    now = time.time()
    for row in rows:
        checkpoint = row.checkpoint
        values = [
            checkpoint.step,
            *(row.epoch for _ in epochs),
            *map(checkpoint.metrics.get, metrics),
            *(row.ranks for _ in ranks),
        ]
        marks = {"newest": row.newest, "best": row.best, "damaged?": row.error is not None}
        table.add_row(
            output.name(row.name, is_folder=row.is_folder),
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
    if foreign := sum(row.writer == DCP for row in rows):
        output.line(f"{output.counted(foreign, 'folder')} of {DCP}: {_ADVICE}", "dim")
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
