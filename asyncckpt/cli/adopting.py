"""`asyncckpt adopt`: describe files of torch.save, so that a Checkpointer continues with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from asyncckpt._loading.adoption import adopt as adopt_file
from asyncckpt._loading.adoption import check, survey
from asyncckpt._naming import SUFFIXES, NameParser, NameTemplate, guess_template
from asyncckpt._saving.engine import get_engine
from asyncckpt.cli.locations import Directory, StorageOptions, directory_at
from asyncckpt.cli.output import (
    AsJson,
    bytes_progress,
    complain,
    counted,
    line,
    message,
    number,
    print_json,
    size,
)
from asyncckpt.errors import AsyncCkptError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncckpt._loading.adoption import Survey
    from asyncckpt.stores.base import Store

    Status = Literal["adopted", "refused", "failed"]

Filename = Annotated[
    str,
    typer.Option(
        metavar="TEMPLATE",
        show_default=False,
        help="The filename of the Checkpointer that is to continue: ckpt_{step:03d}.pth for ckpt_007.pth.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be adopted.")]

_REFUSED, _FAILED = 1, 2
_NAMED = 5  # of other files, in a message


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a file.

    Attributes:
        checkpoint: what it is, or was to be; the sequence is 0 unless it was adopted.
        status: `refused` if it is damaged, misnamed or of another format, `failed` if it could not be read or
            written.
        error: why it was not adopted.
    """

    checkpoint: Checkpoint
    status: Status
    error: str | None = None


def adopt(
    directory: Directory,
    *,
    filename: Filename,
    dry_run: DryRun = False,
    option: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Describe files of torch.save in place, so that a Checkpointer with that filename continues with them.

    Each file that the template names and that has no description is read, checked, and replaced as a whole by
    itself and one more record at its end, which torch.load ignores. The step, and metrics if the template has
    any, are what the name says. In the order of commits the files stand in order of step, behind what is
    there. What is damaged, has no checksums or is of another format is refused and named. The exit status is
    1 if a file was refused, 2 if one could not be read or written, or if no file has such a name.

    Example: asyncckpt adopt runs/old --filename "ckpt_{step:03d}.pth"
    """
    parser = _parser(filename)
    store = directory_at(directory, option)
    found = get_engine().call(survey, store, parser)
    if not found.found and not found.described:
        raise CheckpointNotFoundError(_nothing_fits(directory, filename, found))
    if not dry_run and found.found:
        get_engine().call(store.prepare)
    outcomes = []
    for outcome in _outcomes(store, found, parser.names, dry_run=dry_run):
        outcomes.append(outcome)
        if not as_json:
            _print(outcome, dry_run=dry_run)
    if as_json:
        print_json(_document(outcomes, found, dry_run=dry_run))
    else:
        _print_summary(outcomes, found, dry_run=dry_run)
    statuses = {outcome.status for outcome in outcomes}
    if statuses & {"refused", "failed"}:
        raise typer.Exit(_REFUSED if "refused" in statuses else _FAILED)


def _parser(filename: str) -> NameParser:
    try:
        return NameParser(NameTemplate(filename))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--filename") from error


def _outcomes(store: Store, found: Survey, names: NameTemplate, *, dry_run: bool) -> Iterator[_Outcome]:
    sequence = found.sequence
    for index, checkpoint in enumerate(found.found, 1):
        placed = replace(checkpoint, sequence=sequence + 1)
        name = _name_of(checkpoint)
        try:
            with bytes_progress(f"{index}/{len(found.found)} {name}", checkpoint.nbytes) as advance:
                get_engine().call(check if dry_run else adopt_file, store, placed, advance)
        except CorruptCheckpointError as error:
            yield _Outcome(checkpoint, "refused", message(error))
        except (AsyncCkptError, OSError) as error:
            yield _Outcome(checkpoint, "failed", message(error))
        else:
            sequence += 1
            yield _Outcome(placed, "adopted")
    for name in found.misnamed:
        path, step = store.path_of(name), names.step_of(name)
        reason = f"{path}: the template {names.template!r} does not make this name of step {step}"
        yield _Outcome(Checkpoint(step, path), "refused", reason)


def _nothing_fits(directory: str, filename: str, found: Survey) -> str:
    names = [
        name for name in (*found.misnamed, *found.others) if PurePosixPath(name).suffix in SUFFIXES
    ] or found.others
    if not names:
        return f"{directory} holds no file"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    guess = guess_template(names)
    advice = f"; try --filename {guess!r}" if guess is not None else ""
    there = f"there are: {', '.join(names[:_NAMED])}{more}"
    return f"the template {filename!r} makes no name of a file in {directory}; {there}{advice}"


def _print(outcome: _Outcome, *, dry_run: bool) -> None:
    checkpoint = outcome.checkpoint
    if outcome.error is not None:
        complain(outcome.error)
        return
    word = "would adopt" if dry_run else "adopted"
    metrics = "".join(f", {name} {number(value)}" for name, value in checkpoint.metrics.items())
    line(f"{word} {size(checkpoint.nbytes):>8}  {checkpoint.path}  step {checkpoint.step}{metrics}")


def _print_summary(outcomes: Sequence[_Outcome], found: Survey, *, dry_run: bool) -> None:
    adopted = [outcome.checkpoint for outcome in outcomes if outcome.status == "adopted"]
    parts = [f"{'would adopt' if dry_run else 'adopted'} {counted(len(adopted), 'file')}"]
    for status in ("refused", "failed"):
        count = sum(outcome.status == status for outcome in outcomes)
        parts += [f"{count} {status}"] if count else []
    if found.described:
        parts.append(f"{len(found.described)} described already")
    if found.others:
        parts.append(f"{counted(len(found.others), 'other file')} left alone")
    line("; ".join(parts) + (" (--dry-run: nothing was changed)" if dry_run else ""), "dim")
    if adopted:
        line(
            f"newest {'would be' if dry_run else 'is'} {_name_of(adopted[-1])}, step {adopted[-1].step}",
            "dim",
        )


def _document(outcomes: Sequence[_Outcome], found: Survey, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "files": [_entry(outcome) for outcome in outcomes],
        "described": list(found.described),
        "others": list(found.others),
    }


def _entry(outcome: _Outcome) -> dict[str, Any]:
    checkpoint = outcome.checkpoint
    return {
        "path": checkpoint.path,
        "status": outcome.status,
        "step": checkpoint.step,
        "metrics": dict(checkpoint.metrics),
        "sequence": checkpoint.sequence or None,
        "error": outcome.error,
    }


def _name_of(checkpoint: Checkpoint) -> str:
    return checkpoint.path.rpartition("/")[2]
