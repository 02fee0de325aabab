"""`asyncckpt adopt`: describe what other programs saved, so that a Checkpointer continues with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from asyncckpt._naming import SUFFIXES, NameParser, NameTemplate, guess_template
from asyncckpt.cli import output
from asyncckpt.cli.locations import Directory, StorageOptions, call, directory_at
from asyncckpt.errors import AsyncCkptError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncckpt._loading.adoption import Survey
    from asyncckpt.stores.base import Store

Filename = Annotated[
    str,
    typer.Option(
        metavar="TEMPLATE",
        show_default=False,
        help="Filename of the Checkpointer that will continue: ckpt_{step:03d}.pth for ckpt_007.pth.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be adopted; change nothing.")]

_EXIT_STATUSES = {"refused": 1, "failed": 2}
_NAMED = 5  # of other files, in a message


class _Outcome(NamedTuple):
    checkpoint: Checkpoint  # its sequence is 0 unless it was adopted
    status: str  # "adopted", "refused" as no such file is adopted, or "failed" as reading or writing did
    error: str | None = None


def adopt(
    directory: Directory,
    *,
    filename: Filename,
    dry_run: DryRun = False,
    option: StorageOptions = None,
    as_json: output.AsJson = False,
) -> None:
    """Add descriptions to files of torch.save and folders of DCP, so that a Checkpointer continues with them.

    Each file that fits the template and has no description is checked and atomically replaced by a copy with
    one more record at its end, which torch.load ignores. Of a folder of torch.distributed.checkpoint, every
    item is checked, and .metadata is replaced so; dcp.load reads it as before. Step and metrics come from the
    name. What is adopted follows existing checkpoints in the order of commits, by step. What is damaged, has
    no checksums or is of another format is refused and named. Exit status: 1 if something was refused, 2 if
    something could not be read or written or if nothing fits.

    Example: asyncckpt adopt runs/old --filename "ckpt_{step:03d}.pth"
    """
    from asyncckpt._loading.adoption import survey

    try:
        parser = NameParser(NameTemplate(filename))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--filename") from error
    store = directory_at(directory, option)
    seen = call(survey, store, parser)
    if not seen.found and not seen.described:
        raise CheckpointNotFoundError(_nothing_fits(directory, filename, seen))
    if not dry_run and seen.found:
        call(store.prepare)
    outcomes = []
    for outcome in _outcomes(store, seen, parser.names, dry_run=dry_run):
        outcomes.append(outcome)
        if not as_json:
            _print(outcome, "would adopt" if dry_run else "adopted")
    counts = Counter(outcome.status for outcome in outcomes)
    if as_json:
        files = [
            {
                "path": checkpoint.path,
                "status": status,
                "step": checkpoint.step,
                "metrics": dict(checkpoint.metrics),
                "sequence": checkpoint.sequence or None,
                "error": error,
            }
            for checkpoint, status, error in outcomes
        ]
        found = {"dry_run": dry_run, "files": files, "described": seen.described, "others": seen.others}
        output.print_json(found)
    else:
        kind = "checkpoint" if seen.folders else "file"
        text = f"{'would adopt' if dry_run else 'adopted'} {output.counted(counts['adopted'], kind)}"
        text += "".join(f"; {counts[status]} {status}" for status in _EXIT_STATUSES if counts[status])
        text += f"; {len(seen.described)} described already" if seen.described else ""
        folders = sum(name in seen.folders for name in seen.others)
        for kind, count in {"file": len(seen.others) - folders, "folder": folders}.items():
            text += f"; {output.counted(count, f'other {kind}')} left alone" if count else ""
        output.line(text + (" (--dry-run: nothing was changed)" if dry_run else ""), "dim")
        for newest in [outcome.checkpoint for outcome in outcomes if outcome.status == "adopted"][-1:]:
            name, is_newest = newest.path.rpartition("/")[2], "would be" if dry_run else "is"
            output.line(f"newest {is_newest} {name}, step {newest.step}", "dim")
    raise typer.Exit(next((number for status, number in _EXIT_STATUSES.items() if counts[status]), 0))


def _outcomes(store: Store, seen: Survey, names: NameTemplate, *, dry_run: bool) -> Iterator[_Outcome]:
    from asyncckpt._loading.adoption import adopt as adopt_file
    from asyncckpt._loading.folder_adoption import adopt_folder

    sequence = seen.sequence
    for index, checkpoint in enumerate(seen.found, 1):
        placed = replace(checkpoint, sequence=sequence + 1)
        label = f"{index}/{len(seen.found)} {checkpoint.path.rpartition('/')[2]}"
        try:
            with output.bytes_progress(label, checkpoint.nbytes) as advance:
                name = checkpoint.path.rpartition("/")[2]
                adopt_it = adopt_folder if name in seen.folders else adopt_file
                call(partial(adopt_it, store, placed, advance, dry_run=dry_run))
        except CorruptCheckpointError as error:
            yield _Outcome(checkpoint, "refused", output.message(error))
        except (AsyncCkptError, OSError) as error:
            yield _Outcome(checkpoint, "failed", output.message(error))
        else:
            sequence += 1
            yield _Outcome(placed, "adopted")
    for name in seen.misnamed:
        path, step = store.path_of(name), names.step_of(name)
        reason = f"{path}: the template {names.template!r} gives step {step} another name"
        yield _Outcome(Checkpoint(step, path), "refused", reason)


def _print(outcome: _Outcome, word: str) -> None:
    checkpoint, _, error = outcome
    if error is not None:
        output.complain(error)
        return
    metrics = "".join(f", {name} {output.number(value)}" for name, value in checkpoint.metrics.items())
    nbytes = output.size(checkpoint.nbytes)
    output.line(f"{word} {nbytes:>8}  {checkpoint.path}  step {checkpoint.step}{metrics}")


def _nothing_fits(directory: str, filename: str, seen: Survey) -> str:
    there = [*seen.misnamed, *seen.others]
    names = [name for name in there if PurePosixPath(name).suffix in SUFFIXES] or seen.others
    if not names:
        return f"{directory} holds no file"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    guess = guess_template(names)
    advice = f"; try --filename {guess!r}" if guess is not None else ""
    listed = f"there are: {', '.join(names[:_NAMED])}{more}"
    return f"no file in {directory} fits the template {filename!r}; {listed}{advice}"
