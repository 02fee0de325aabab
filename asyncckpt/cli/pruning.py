"""`asyncckpt prune`: remove the checkpoints that no policy keeps."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._inspection.texts import clean
from asyncckpt.cli import output
from asyncckpt.cli.formats import foreign_format, looks_like_checkpoint
from asyncckpt.cli.locations import Directory, StorageOptions, call, directory_at
from asyncckpt.cli.series import by_series, parse_metric, require_metric, series_text
from asyncckpt.errors import AsyncCkptError, StoreError
from asyncckpt.retention import AnyOf, BestK, EveryN, LastN, evict
from asyncckpt.stores.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from asyncckpt._loading.catalog import Entry
    from asyncckpt.retention import Policy
    from asyncckpt.stores.base import Store
    from asyncckpt.types import Checkpoint

Keep = Annotated[
    list[str],
    typer.Option(
        metavar="POLICY",
        show_default=False,
        help="best:K:METRIC[:min|max], last:N or every:N (steps). Repeatable: a checkpoint stays if any of"
        " them keeps it.",
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
    bool,
    typer.Option(
        "--verify", help="Check every byte of all that stays, not only of the newest of each series."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be removed; remove nothing.")]

_FAILED = 1
_REMOVED = "removed"


@dataclass(slots=True)
class _Decision:
    name: str
    checkpoint: Checkpoint
    series: str | None  # its template; None for files of old versions
    why: list[str]  # what keeps it; empty if it has to go
    is_folder: bool = False
    error: str | None = None  # why it could not be removed; of one that stays, how it is damaged
    done: str = "keep"  # as shown in the table

    def failed(self, done: str, error: Exception) -> None:
        self.done, self.error = done, output.message(error)


def prune(  # noqa: PLR0913 - the options of the command
    directory: Directory,
    *,
    keep: Keep,
    series: Only = None,
    verify: Verify = False,
    dry_run: DryRun = False,
    option: StorageOptions = None,
    as_json: output.AsJson = False,
) -> None:
    """Remove the checkpoints of a directory that no --keep keeps.

    Considers checkpoints that a Checkpointer saved, files and folders alike, each series (one filename
    template) on its own; other files, folders and copies under other names are left alone. The newest of each
    series always stays, and so do the targets of symbolic links in the directory. Before anything is removed,
    the structure of every checkpoint that stays is checked, and every byte of the newest of each series; if
    one is damaged, nothing is removed. Exit status: 1 if one is damaged or could not be removed.

    Example: asyncckpt prune runs/gpt --keep best:3:val_loss --keep last:2
    """
    from asyncckpt._loading.catalog import Catalog

    gone = "would remove" if dry_run else _REMOVED
    policies = {spec: _parse_policy(spec) for spec in keep}
    store = directory_at(directory, option)
    entries = call(Catalog(store).entries)
    decisions = _decide(policies, _series_in(entries, series), _links_in(store), _folders_in(entries))
    damaged = call(_damaged, store, entries)
    staying = [decision for decision in decisions if decision.why]
    leaving = [decision for decision in decisions if not decision.why]
    if leaving or verify:
        _check(store, staying, wholly=verify)
    blocked = any(decision.error for decision in staying)
    for decision in leaving:
        decision.done = "not removed" if blocked else gone
        if decision.done == _REMOVED:
            try:
                call(store.remove, decision.name)
            except StoreError as error:
                decision.failed("failed", error)
    decided = {decision.checkpoint.path for decision in decisions}
    others = [
        entry
        for entry in entries
        if entry not in damaged and (entry.checkpoint is None or entry.checkpoint.path not in decided)
    ]
    failed = [decision for decision in decisions if decision.error]
    removed = [decision for decision in leaving if decision.done == gone]
    if as_json:
        found_damaged = [{"name": entry.file.name, "error": str(entry.error)} for entry in damaged]
        document = {
            "dry_run": dry_run,
            "blocked": blocked,
            "kept": [_entry(decision) | {"why": decision.why} for decision in staying],
            "removed": [_entry(decision) for decision in removed],
            "failed": [_entry(decision) | {"error": decision.error} for decision in failed],
        }
        output.print_json(document | {"damaged": found_damaged, "others": len(others)})
    else:
        _print_table(decisions, damaged)
        freed = output.size(sum(decision.checkpoint.nbytes for decision in removed))
        text = f"{gone} {output.counted(len(removed), 'checkpoint')}, {freed}"
        text += f"; {len(decisions) - len(removed)} stay"
        text += "".join(_left_alone("damaged", damaged) + _left_alone("other", others))
        output.line(text + (" (--dry-run: nothing was removed)" if dry_run else ""), "dim")
    for decision in failed:
        output.complain(decision.error or decision.name)
    if blocked:
        output.complain(
            "nothing was removed: checkpoints that stay are damaged; move or delete them, then prune again"
        )
    if failed:
        raise typer.Exit(_FAILED)


def _left_alone(what: str, entries: Sequence[Entry]) -> list[str]:
    """Return how many files and how many folders are left alone, as the ends of a message."""
    folders = sum(entry.is_folder for entry in entries)
    counts = {"file": len(entries) - folders, "folder": folders}
    return [f"; {output.counted(n, f'{what} {kind}')} left alone" for kind, n in counts.items() if n]


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
        f"{spec!r} is not a policy; use best:K:METRIC[:min|max], last:N or every:N", param_hint="--keep"
    )


def _series_in(entries: Sequence[Entry], only: str | None) -> Mapping[str | None, Sequence[Checkpoint]]:
    for entry in entries:
        if isinstance(entry.error, StoreError):  # it may be the newest, or the best
            raise entry.error
    found = by_series(entry.checkpoint for entry in entries if entry.checkpoint)
    if only is None:
        return found
    if only not in found:
        there = ", ".join(map(series_text, found)) or "none at all"
        raise typer.BadParameter(f"there is no series {only!r}; there are: {there}", param_hint="--series")
    return {only: found[only]}


def _folders_in(entries: Sequence[Entry]) -> set[str]:
    """Return the paths of the checkpoints that are folders."""
    return {entry.checkpoint.path for entry in entries if entry.is_folder and entry.checkpoint}


def _links_in(store: Store) -> Mapping[str, Sequence[str]]:
    """Return the names of the symbolic links in a local directory, by their targets in it."""
    links: defaultdict[str, list[str]] = defaultdict(list)
    if isinstance(store, LocalStore):
        directory = Path(os.path.realpath(store.path_of("")))
        for entry in filter(Path.is_symlink, sorted(directory.iterdir())):
            target = Path(os.path.realpath(entry))
            if target.parent == directory:
                links[target.name].append(entry.name)
    return links


async def _damaged(store: Store, entries: Sequence[Entry]) -> list[Entry]:
    """Return the files and folders that look like checkpoints and are damaged."""
    return [
        entry
        for entry in entries
        if entry.error is not None
        and (
            entry.is_folder
            or (
                await looks_like_checkpoint(store, entry.file)
                and await foreign_format(store, entry.file) is None
            )
        )
    ]


def _decide(
    policies: Mapping[str, Policy],
    found: Mapping[str | None, Sequence[Checkpoint]],
    links: Mapping[str, Sequence[str]],
    folders: Collection[str],
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
            why += [f"target of {link}" for link in links.get(name, ())]
            decisions.append(_Decision(name, checkpoint, series, why, path in folders))
    return decisions


def _check(store: Store, staying: Sequence[_Decision], *, wholly: bool) -> None:
    """Check every byte of the newest of each series, or of all, and the structure of the others."""
    from asyncckpt._loading.folder_structure import check_files
    from asyncckpt._loading.reader import read_file, verify_file
    from asyncckpt._loading.structure import check_structure
    from asyncckpt.cli.folders import read_folder

    whole = staying if wholly else [*{decision.series: decision for decision in staying}.values()]
    for decision in staying:
        name = decision.name
        try:
            if decision in whole:
                label = f"{whole.index(decision) + 1}/{len(whole)} {name}"
                with output.bytes_progress(label, decision.checkpoint.nbytes) as advance:
                    if decision.is_folder:
                        call(read_folder, methodcaller("verify", advance), store, name)
                    else:
                        call(verify_file, store, name, advance)
            elif decision.is_folder:
                call(read_folder, check_files, store, name)
            else:
                call(read_file, check_structure, store, name)
        except (AsyncCkptError, OSError) as error:
            decision.failed("damaged", error)


def _entry(decision: _Decision) -> dict[str, Any]:
    checkpoint = decision.checkpoint
    return {
        "name": decision.name,
        "path": checkpoint.path,
        "folder": decision.is_folder,
        "series": decision.series,
        "step": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
        "nbytes": checkpoint.nbytes,
    }


def _print_table(decisions: Sequence[_Decision], damaged: Sequence[Entry]) -> None:
    series = ["series"] if len({decision.series for decision in decisions}) > 1 else []
    table = output.new_table("", "name", *series, "size", "why", right=["size"])
    for decision in decisions:
        table.add_row(
            decision.done,
            output.name(decision.name, is_folder=decision.is_folder),
            *(series_text(decision.series) for _ in series),
            output.size(decision.checkpoint.nbytes),
            clean(", ".join(decision.why)),
            style="red" if decision.error else None,
        )
    for entry in damaged:
        name = output.name(entry.file.name, is_folder=entry.is_folder)
        nbytes = "?" if entry.is_folder else output.size(entry.file.nbytes)
        table.add_row("damaged", name, *("" for _ in series), nbytes, str(entry.error))
    if table.row_count:
        output.print_table(table)
