"""`asyncckpt prune`: remove the checkpoints that no policy keeps."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._outline.texts import clean
from asyncckpt.cli.formats import foreign_format, looks_like_checkpoint
from asyncckpt.cli.locations import Directory, StorageOptions, call, directory_at
from asyncckpt.cli.output import (
    AsJson,
    bytes_progress,
    complain,
    counted,
    line,
    message,
    new_table,
    print_json,
    print_table,
    size,
)
from asyncckpt.cli.series import by_series, parse_metric, require_metric, series_text
from asyncckpt.errors import AsyncCkptError, StoreError
from asyncckpt.retention import AnyOf, BestK, EveryN, LastN, evict
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
_REMOVED, _DRY = "removed", "would remove"


@dataclass(slots=True)
class _Decision:
    """What becomes of a checkpoint.

    Attributes:
        series: its template; None for that of files of old versions.
        why: what keeps it; nothing if it is to be removed.
        error: why it could not be removed; of one that stays, how it is damaged.
        done: what was done, as shown in the table.
    """

    name: str
    checkpoint: Checkpoint
    series: str | None
    why: list[str]
    error: str | None = None
    done: str = "keep"


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
    from asyncckpt._loading.catalog import Catalog

    policies = {spec: _parse_policy(spec) for spec in keep}
    store = directory_at(directory, option)
    entries = call(Catalog(store).entries)
    for entry in entries:
        if isinstance(entry.error, StoreError):  # it may be the newest, or the best
            raise entry.error
    found = by_series(entry.checkpoint for entry in entries if entry.checkpoint)
    if series is not None:
        if series not in found:
            there = ", ".join(map(series_text, found)) or "none at all"
            raise typer.BadParameter(
                f"there is no series {series!r}; there are: {there}", param_hint="--series"
            )
        found = {series: found[series]}
    decisions = _decide(policies, found, _links_in(store))
    damaged = call(_damaged, store, entries)
    staying = [decision for decision in decisions if decision.why]
    leaving = [decision for decision in decisions if not decision.why]
    blocked = bool(leaving or verify) and _check(store, staying, wholly=verify)
    _remove(store, leaving, blocked=blocked, dry_run=dry_run)
    others = len(entries) - len(decisions) - len(damaged)
    failed = [decision for decision in decisions if decision.error]
    removed = [decision for decision in leaving if decision.done in {_REMOVED, _DRY}]
    if as_json:
        document = {
            "dry_run": dry_run,
            "blocked": blocked,
            "kept": [_entry(decision) | {"why": decision.why} for decision in staying],
            "removed": [_entry(decision) for decision in removed],
            "failed": [_entry(decision) | {"error": decision.error} for decision in failed],
            "damaged": [{"name": entry.file.name, "error": str(entry.error)} for entry in damaged],
            "others": others,
        }
        print_json(document)
    else:
        _print_table(decisions, damaged)
        freed = size(sum(decision.checkpoint.nbytes for decision in removed))
        text = f"{_DRY if dry_run else _REMOVED} {counted(len(removed), 'checkpoint')}, {freed}"
        text += f"; {len(decisions) - len(removed)} stay"
        text += f"; {counted(len(damaged), 'damaged file')} left alone" if damaged else ""
        text += f"; {counted(others, 'other file')} left alone" if others else ""
        line(text + (" (--dry-run: nothing was removed)" if dry_run else ""), "dim")
    for decision in failed:
        complain(decision.error or decision.name)
    if blocked:
        complain("nothing was removed, as these are to stay: move or remove them, then prune again")
    if failed:
        raise typer.Exit(_FAILED)


def _parse_policy(spec: str) -> Policy:
    kind, _, rest = spec.partition(":")
    count, _, metric = rest.partition(":")
    try:
        if kind == "best":
            return BestK(int(count), *parse_metric(metric))
        if kind == "last":
            return LastN(int(rest))
        if kind == "every":
            return EveryN(int(rest))
    except ValueError:
        pass
    raise typer.BadParameter(
        f"{spec!r} is no policy; use best:K:METRIC[:min|max], last:N or every:N", param_hint="--keep"
    )


def _links_in(store: Store) -> Mapping[str, Sequence[str]]:
    """Return the names of the symbolic links to each file of a local directory, within that directory."""
    links: defaultdict[str, list[str]] = defaultdict(list)
    if isinstance(store, LocalStore):
        directory = Path(os.path.realpath(store.path_of("")))
        for entry in filter(Path.is_symlink, sorted(directory.iterdir())):
            target = Path(os.path.realpath(entry))
            if target.parent == directory:
                links[target.name].append(entry.name)
    return links


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
) -> list[_Decision]:
    decisions = []
    for series, checkpoints in found.items():
        where = f" of the series {series_text(series)}" if len(found) > 1 else ""
        for policy in policies.values():
            if isinstance(policy, BestK):  # by a mistyped metric it would keep nothing
                require_metric(policy.metric, checkpoints, "--keep", where)
        leaving = {c.path for c in evict(AnyOf(tuple(policies.values())), checkpoints)}
        kept = {spec: {c.path for c in policy.keep(checkpoints)} for spec, policy in policies.items()}
        for checkpoint in checkpoints:
            path, name = checkpoint.path, checkpoint.path.rpartition("/")[2]
            why = [spec for spec in policies if path in kept[spec]]
            if not why and path not in leaving:
                why = ["newest"]
            why += [f"{link} leads to it" for link in links.get(name, ())]
            decisions.append(_Decision(name, checkpoint, series, why))
    return decisions


def _check(store: Store, staying: Sequence[_Decision], *, wholly: bool) -> bool:
    """Check the structure of all, and every byte of the newest or of all; returns whether any is damaged."""
    from asyncckpt._loading.load import verify_file

    call(_check_structures, store, staying)
    newest = {decision.series: decision for decision in staying}
    whole = [decision for decision in (staying if wholly else newest.values()) if decision.error is None]
    for number, decision in enumerate(whole, 1):
        label = f"{number}/{len(whole)} {decision.name}"
        try:
            with bytes_progress(label, decision.checkpoint.nbytes) as advance:
                call(verify_file, store, decision.name, advance)
        except (AsyncCkptError, OSError) as error:
            _fail(decision, "damaged", error)
    return any(decision.error for decision in staying)


async def _check_structures(store: Store, staying: Sequence[_Decision]) -> None:
    from asyncckpt._loading.catalog import READERS
    from asyncckpt._loading.load import read_file
    from asyncckpt._loading.structure import check_structure
    from asyncckpt._threads import for_each

    async def check(decision: _Decision) -> None:
        try:
            await read_file(check_structure, store, decision.name)
        except (AsyncCkptError, OSError) as error:
            _fail(decision, "damaged", error)

    await for_each(check, staying, READERS)


def _remove(store: Store, leaving: Sequence[_Decision], *, blocked: bool, dry_run: bool) -> None:
    for decision in leaving:
        decision.done = "not removed" if blocked else _DRY if dry_run else _REMOVED
        if decision.done == _REMOVED:
            try:
                call(store.remove, decision.name)
            except StoreError as error:
                _fail(decision, "failed", error)


def _fail(decision: _Decision, done: str, error: Exception) -> None:
    decision.done, decision.error = done, message(error)


def _entry(decision: _Decision) -> dict[str, Any]:
    checkpoint = decision.checkpoint
    return {
        "name": decision.name,
        "path": checkpoint.path,
        "series": decision.series,
        "step": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
        "nbytes": checkpoint.nbytes,
    }


def _print_table(decisions: Sequence[_Decision], damaged: Sequence[Entry]) -> None:
    series = ["series"] if len({decision.series for decision in decisions}) > 1 else []
    table = new_table("", "name", *series, "size", "why", right=["size"])
    for decision in decisions:
        table.add_row(
            decision.done,
            clean(decision.name),
            *(series_text(decision.series) for _ in series),
            size(decision.checkpoint.nbytes),
            clean(", ".join(decision.why)),
            style="red" if decision.error else None,
        )
    for entry in damaged:
        name, nbytes = clean(entry.file.name), size(entry.file.nbytes)
        table.add_row("damaged", name, *("" for _ in series), nbytes, str(entry.error))
    if table.row_count:
        print_table(table)
