"""`asyncckpt prune`: remove the checkpoints that no policy keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt.catalog import Catalog
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
from asyncckpt.engine import get_engine
from asyncckpt.errors import StoreError
from asyncckpt.outline.texts import clean
from asyncckpt.retention import AnyOf, BestK, evict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Remove nothing; say what would be removed.")]

_FAILED = 1


@dataclass(slots=True)
class _Fate:
    """What becomes of a checkpoint.

    Attributes:
        why: what keeps it; nothing if it is to go.
        error: why it could not be removed.
    """

    name: str
    checkpoint: Checkpoint
    why: list[str] = field(default_factory=list)
    error: str | None = None


def prune(
    directory: Directory,
    *,
    keep: Keep,
    dry_run: DryRun = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints of a directory that no --keep keeps.

    All that were saved by a Checkpointer count, whatever their names; other files are left alone. The newest
    stays in any case, and so does what a symbolic link in the directory leads to. The exit status is 1 if one
    could not be removed.

    Example: asyncckpt prune runs/gpt --keep best:3:val_loss --keep last:2
    """
    policies = {spec: parse_policy(spec) for spec in keep}
    store = directory_at(directory, option)
    # Files of asyncckpt.save and of Lightning have no place in the order of commits.
    checkpoints = [c for c in get_engine().call(Catalog(store).checkpoints) if c.sequence]
    others = len(get_engine().call(store.list)) - len(checkpoints)
    if checkpoints:
        _require_metrics(policies.values(), checkpoints)
    fates = _decide(policies, checkpoints, links_in(store))
    if not dry_run:
        _remove(store, fates)
    if as_json:
        print_json(_as_json(fates, others, dry_run=dry_run))
    else:
        _print(fates, others, dry_run=dry_run)
    failed = [fate for fate in fates if fate.error is not None]
    for fate in failed:
        complain(fate.error or fate.name)
    if failed:
        raise typer.Exit(_FAILED)


def _require_metrics(policies: Iterable[Policy], checkpoints: Sequence[Checkpoint]) -> None:
    """Raise unless each metric is one that there is: a mistyped one would keep nothing."""
    for policy in policies:
        if isinstance(policy, BestK):
            require_metric(policy.metric, checkpoints, "--keep")


def _decide(
    policies: Mapping[str, Policy], checkpoints: Sequence[Checkpoint], links: Mapping[str, Sequence[str]]
) -> list[_Fate]:
    """Return the fate of each checkpoint, in order of commit."""
    leaving = {c.path for c in evict(AnyOf(tuple(policies.values())), checkpoints)}
    kept = {spec: {c.path for c in policy.keep(checkpoints)} for spec, policy in policies.items()}
    fates = []
    for checkpoint in checkpoints:
        path, name = checkpoint.path, checkpoint.path.rpartition("/")[2]
        why = [spec for spec in policies if path in kept[spec]]
        if not why and path not in leaving:
            why = ["newest"]
        why += [f"{link} leads to it" for link in links.get(name, ())]
        fates.append(_Fate(name, checkpoint, why))
    return fates


def _remove(store: Store, fates: Iterable[_Fate]) -> None:
    for fate in fates:
        if not fate.why:
            try:
                get_engine().call(store.remove, fate.name)
            except StoreError as error:
                fate.error = message(error)


def _as_json(fates: Sequence[_Fate], others: int, *, dry_run: bool) -> dict[str, Any]:
    entries = [(fate, _entry(fate)) for fate in fates]
    return {
        "dry_run": dry_run,
        "kept": [entry | {"why": fate.why} for fate, entry in entries if fate.why],
        "removed": [entry for fate, entry in entries if not fate.why and fate.error is None],
        "failed": [entry | {"error": fate.error} for fate, entry in entries if fate.error is not None],
        "others": others,
    }


def _entry(fate: _Fate) -> dict[str, Any]:
    checkpoint = fate.checkpoint
    return {
        "name": fate.name,
        "path": checkpoint.path,
        "step": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
        "nbytes": checkpoint.nbytes,
    }


def _print(fates: Sequence[_Fate], others: int, *, dry_run: bool) -> None:
    gone = "would remove" if dry_run else "removed"
    removed = [fate for fate in fates if not fate.why and fate.error is None]
    table = new_table("", "name", "size", "why", right=["size"])
    for fate in fates:
        word = "keep" if fate.why else "failed" if fate.error is not None else gone
        table.add_row(word, clean(fate.name), size(fate.checkpoint.nbytes), clean(", ".join(fate.why)))
    if fates:
        print_table(table)
    freed = size(sum(fate.checkpoint.nbytes for fate in removed))
    parts = [f"{gone} {counted(len(removed), 'checkpoint')}, {freed}", f"{len(fates) - len(removed)} stay"]
    if others:
        parts.append(f"{counted(others, 'other file')} left alone")
    line("; ".join(parts) + (" (--dry-run: nothing was removed)" if dry_run else ""), "dim")
