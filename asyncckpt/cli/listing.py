"""`asyncckpt ls`: the checkpoints of a directory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt.catalog import READERS
from asyncckpt.cli.locations import Directory, StorageOptions, directory_at, looks_like_checkpoint, modified
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
from asyncckpt.engine import get_engine
from asyncckpt.errors import CorruptCheckpointError, StoreError
from asyncckpt.inspection.contents import summarize
from asyncckpt.outline.texts import clean
from asyncckpt.retention import rank
from asyncckpt.threads import for_each, in_thread
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """What there is.

    Attributes:
        rows: in order of commit; those that cannot be read last.
        metrics: names of all.
        ranking: what "best" means, if that is known.
        best, newest: paths.
    """

    rows: Sequence[_Row]
    metrics: Sequence[str]
    ranking: tuple[str, Mode] | None
    best: str | None
    newest: str | None


def ls(
    directory: Directory, *, best: Best = None, option: StorageOptions = None, as_json: AsJson = False
) -> None:
    """List the checkpoints of a directory: what each one tells, the newest and the best.

    Those of asyncckpt, Lightning and torch.save; nothing is unpickled. What looks like a checkpoint but
    cannot be read as one is listed as `damaged?`.

    Example: asyncckpt ls runs/gpt --best val_loss
    """
    store = directory_at(directory, option)
    listing = _listing(get_engine().call(_read, store), best)
    if as_json:
        print_json([_as_json(row, listing) for row in listing.rows])
    elif listing.rows:
        _print_table(listing)
        _print_captions(listing)
    else:
        line(f"there are no checkpoints in {directory}")


async def _read(store: Store) -> list[_Row]:
    rows = await for_each(partial(_row, store), await store.list(), READERS)
    return [row for row in rows if row is not None]


async def _row(store: Store, file: StoredFile) -> _Row | None:
    """Return the row of a file; None if it is no checkpoint, or was removed since it was listed."""
    path = store.path_of(file.name)
    try:
        changed = await in_thread(modified, store, file.name)
        async with store.open(file.name) as opened:
            summary = await summarize(opened)
    except FileNotFoundError:
        return None
    except (CorruptCheckpointError, StoreError) as error:
        if not await looks_like_checkpoint(store, file):
            return None
        return _Row(file.name, Checkpoint(None, path, {}, file.nbytes, changed), error=message(error))
    checkpoint = replace(summary.checkpoint, created=summary.checkpoint.created or changed)
    return _Row(file.name, checkpoint, summary.writer, summary.epoch)


def _listing(rows: Sequence[_Row], best: str | None) -> _Listing:
    ordered = sorted(rows, key=_order)
    good = [row.checkpoint for row in ordered if row.error is None]
    metrics = metric_names(good)
    ranking: tuple[str, Mode] | None = None
    if best is not None and good:
        ranking = parse_metric(best)
        require_metric(ranking[0], good, "--best")
    elif len(metrics) == 1:
        ranking = metrics[0], "min"
    ranked = rank(good, *ranking) if ranking else []
    return _Listing(ordered, metrics, ranking, ranked[0].path if ranked else None, _newest(good))


def _order(row: _Row) -> tuple[bool, int, float, str]:
    return row.error is not None, row.checkpoint.sequence, row.checkpoint.created, row.name


def _newest(ordered: Sequence[Checkpoint]) -> str | None:
    """Return the path of the checkpoint committed last, unless nobody tells which one that is."""
    is_told = bool(ordered) and (ordered[-1].sequence > 0 or all(c.created for c in ordered))
    return ordered[-1].path if is_told else None


def _as_json(row: _Row, listing: _Listing) -> dict[str, Any]:
    checkpoint = row.checkpoint
    return {
        "name": row.name,
        "path": checkpoint.path,
        "writer": row.writer,
        "step": checkpoint.step,
        "epoch": row.epoch,
        "metrics": dict(checkpoint.metrics),
        "nbytes": checkpoint.nbytes,
        "created": checkpoint.created or None,
        "newest": checkpoint.path == listing.newest,
        "best": checkpoint.path == listing.best,
        "error": row.error,
    }


def _print_table(listing: _Listing) -> None:
    epochs = ["epoch"] if any(row.epoch is not None for row in listing.rows) else []
    metrics = listing.metrics[:_METRIC_COLUMNS]
    numbers = ["step", *epochs, *metrics, "size", "age"]
    table = new_table("name", *numbers, "", right=numbers)
    now = time.time()
    for row in listing.rows:
        checkpoint = row.checkpoint
        table.add_row(
            clean(row.name),
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
        line(_best_caption(*listing.ranking), "dim")
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
        "newest": path == listing.newest,
        "best": path == listing.best,
        "damaged?": row.error is not None,
    }
    return ", ".join(mark for mark, applies in marks.items() if applies)
