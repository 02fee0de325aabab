"""`asyncckpt prune`: remove the checkpoints that no policy keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.texts import clean
from asyncckpt._loading.catalog import Catalog
from asyncckpt._saving.engine import get_engine
from asyncckpt.cli.by_series import by_series, series_text
from asyncckpt.cli.checking import find_damage
from asyncckpt.cli.formats import foreign_format, looks_like_checkpoint
from asyncckpt.cli.locations import Directory, StorageOptions, directory_at, links_in
from asyncckpt.cli.output import (
    AsJson,
    complain,
    counted,
    line,
    message,
    new_table,
    print_json,
    print_table,
    size,
)
from asyncckpt.cli.policies import parse_policy, require_metric
from asyncckpt.errors import StoreError
from asyncckpt.retention import AnyOf, BestK, evict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from asyncckpt._loading.catalog import Entry
    from asyncckpt.retention import Policy
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

Keep = Annotated[
    list[str],
    typer.Option(
        metavar="POLICY",
        show_default=False,
        help="best:K:METRIC[:min|max], last:N or every:N (steps). Repeatable: what any of them keeps stays.",
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        "--series",
        metavar="TEMPLATE",
        help="Prune only the checkpoints of a Checkpointer with this filename.",
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read all that is to stay whole, not only the newest of each series.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Remove nothing; say what would be removed.")]

_FAILED = 1


@dataclass(slots=True)
class _Fate:
    """What becomes of a checkpoint.

    Attributes:
        series: its template; None for that of old files which do not tell.
        why: what keeps it; nothing if it is to go.
        error: why it could not be removed; of one that stays, how it is damaged.
    """

    name: str
    checkpoint: Checkpoint
    series: str | None
    why: list[str] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Result:
    """What becomes of a directory.

    Attributes:
        fates: of the checkpoints, series by series, in order of commit.
        damaged: files that have no whole directory: they count for nothing and are left alone.
        others: how many other files there are.
        blocked: whether nothing is removed, since one that is to stay is damaged.
    """

    fates: Sequence[_Fate]
    damaged: Sequence[Entry]
    others: int
    blocked: bool

    @property
    def several(self) -> bool:
        return len({fate.series for fate in self.fates}) > 1

    @property
    def removed(self) -> list[_Fate]:
        return [fate for fate in self.fates if not (fate.why or fate.error or self.blocked)]

    @property
    def failed(self) -> list[_Fate]:
        return [fate for fate in self.fates if fate.error is not None]


def prune(  # noqa: PLR0913 - the options of the command
    directory: Directory,
    *,
    keep: Keep,
    series: Only = None,
    verify: Verify = False,
    dry_run: DryRun = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints of a directory that no --keep keeps.

    Those that were saved by a Checkpointer count, each series (of one filename template) on its own; other
    files, and copies under other names, are left alone. The newest of each series stays in any case, and so
    does what a symbolic link in the directory leads to. Before anything is removed, the directory and headers
    of each file that is to stay are checked, and every byte of the newest of each series: if one is damaged,
    nothing is removed. The exit status is 1 then, or if one could not be removed.

    Example: asyncckpt prune runs/gpt --keep best:3:val_loss --keep last:2
    """
    policies = {spec: parse_policy(spec) for spec in keep}
    store = directory_at(directory, option)
    entries = get_engine().call(Catalog(store).entries)
    for entry in entries:
        if isinstance(entry.error, StoreError):  # it may be the newest, or the best
            raise entry.error
    found = _chosen(by_series(entry.checkpoint for entry in entries if entry.checkpoint), series)
    _require_metrics(policies.values(), found)
    damaged = get_engine().call(_damaged, store, entries)
    fates = _decide(policies, found, links_in(store))
    blocked = _check(store, fates, wholly=verify)
    if not dry_run and not blocked:
        _remove(store, fates)
    result = _Result(fates, damaged, len(entries) - len(fates) - len(damaged), blocked)
    if as_json:
        print_json(_as_json(result, dry_run=dry_run))
    else:
        _print(result, dry_run=dry_run)
    for fate in result.failed:
        complain(fate.error or fate.name)
    if blocked:
        complain("nothing was removed, as these are to stay: move or remove them, then prune again")
    if result.failed:
        raise typer.Exit(_FAILED)


def _chosen(
    found: Mapping[str | None, Sequence[Checkpoint]], series: str | None
) -> Mapping[str | None, Sequence[Checkpoint]]:
    if series is None:
        return found
    if series not in found:
        there = ", ".join(clean(series_text(key)) for key in found) or "none at all"
        raise typer.BadParameter(f"there is no series {series!r}; there are: {there}", param_hint="--series")
    return {series: found[series]}


def _require_metrics(policies: Iterable[Policy], found: Mapping[str | None, Sequence[Checkpoint]]) -> None:
    """Raise unless each series has each metric: by a mistyped one nothing would be kept."""
    for policy in policies:
        for key, checkpoints in found.items():
            if isinstance(policy, BestK):
                where = f" of the series {clean(series_text(key))}" if len(found) > 1 else ""
                require_metric(policy.metric, checkpoints, "--keep", where)


async def _damaged(store: Store, entries: Sequence[Entry]) -> list[Entry]:
    """Return the files that look like checkpoints and cannot be whole ones."""
    return [
        entry
        for entry in entries
        if entry.error is not None
        and await looks_like_checkpoint(store, entry.file)
        and await foreign_format(store, entry.file) is None
    ]


def _decide(
    policies: Mapping[str, Policy],
    found: Mapping[str | None, Sequence[Checkpoint]],
    links: Mapping[str, Sequence[str]],
) -> list[_Fate]:
    """Return the fate of each checkpoint, series by series, in order of commit."""
    fates = []
    for series, checkpoints in found.items():
        leaving = {c.path for c in evict(AnyOf(tuple(policies.values())), checkpoints)}
        kept = {spec: {c.path for c in policy.keep(checkpoints)} for spec, policy in policies.items()}
        for checkpoint in checkpoints:
            path, name = checkpoint.path, checkpoint.path.rpartition("/")[2]
            why = [spec for spec in policies if path in kept[spec]]
            if not why and path not in leaving:
                why = ["newest"]
            why += [f"{link} leads to it" for link in links.get(name, ())]
            fates.append(_Fate(name, checkpoint, series, why))
    return fates


def _check(store: Store, fates: Sequence[_Fate], *, wholly: bool) -> bool:
    """Check what is to stay, if anything is to go or all is to be read; returns whether any is damaged."""
    staying = [fate for fate in fates if fate.why]
    if len(staying) == len(fates) and not wholly:
        return False
    newest = {fate.series: fate for fate in staying}
    damage = find_damage(
        store,
        [fate.checkpoint for fate in staying],
        [fate.checkpoint for fate in (staying if wholly else newest.values())],
    )
    for fate in staying:
        fate.error = damage.get(fate.checkpoint.path)
    return bool(damage)


def _remove(store: Store, fates: Iterable[_Fate]) -> None:
    for fate in fates:
        if not fate.why:
            try:
                get_engine().call(store.remove, fate.name)
            except StoreError as error:
                fate.error = message(error)


def _as_json(result: _Result, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "blocked": result.blocked,
        "kept": [_entry(fate) | {"why": fate.why} for fate in result.fates if fate.why],
        "removed": [_entry(fate) for fate in result.removed],
        "failed": [_entry(fate) | {"error": fate.error} for fate in result.failed],
        "damaged": [{"name": entry.file.name, "error": str(entry.error)} for entry in result.damaged],
        "others": result.others,
    }


def _entry(fate: _Fate) -> dict[str, Any]:
    checkpoint = fate.checkpoint
    return {
        "name": fate.name,
        "path": checkpoint.path,
        "series": fate.series,
        "step": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
        "nbytes": checkpoint.nbytes,
    }


def _print(result: _Result, *, dry_run: bool) -> None:
    gone = "would remove" if dry_run else "removed"
    names = ["series"] if result.several else []
    table = new_table("", "name", *names, "size", "why", right=["size"])
    for fate in result.fates:
        word = (
            "damaged" if fate.why and fate.error else "keep" if fate.why else "failed" if fate.error else gone
        )
        word = "not removed" if result.blocked and not fate.why else word
        table.add_row(
            word,
            clean(fate.name),
            *([clean(series_text(fate.series))] if names else []),
            size(fate.checkpoint.nbytes),
            clean(", ".join(fate.why)),
            style="red" if fate.error else None,
        )
    for entry in result.damaged:
        blank = [""] if names else []
        table.add_row("damaged", clean(entry.file.name), *blank, size(entry.file.nbytes), str(entry.error))
    if table.row_count:
        print_table(table)
    removed = result.removed
    freed = size(sum(fate.checkpoint.nbytes for fate in removed))
    parts = [
        f"{gone} {counted(len(removed), 'checkpoint')}, {freed}",
        f"{len(result.fates) - len(removed)} stay",
    ]
    if result.damaged:
        parts.append(f"{counted(len(result.damaged), 'damaged file')} left alone")
    if result.others:
        parts.append(f"{counted(result.others, 'other file')} left alone")
    line("; ".join(parts) + (" (--dry-run: nothing was removed)" if dry_run else ""), "dim")
