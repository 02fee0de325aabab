"""`asyncckpt verify`: read files whole and compare every checksum."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from asyncckpt.cli.locations import StorageOptions, files_at, options_for
from asyncckpt.cli.output import AsJson, bytes_progress, complain, counted, line, message, print_json, size
from asyncckpt.engine import get_engine
from asyncckpt.errors import AsyncCkptError, CheckpointNotFoundError, CorruptCheckpointError
from asyncckpt.restore import verify_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncckpt.stores.base import Store, StoredFile

Paths = Annotated[list[str], typer.Argument(metavar="FILE|DIR", help="Local paths or URLs.")]

_FAILED, _UNREADABLE = 1, 2


@dataclass(frozen=True, slots=True)
class _Verdict:
    path: str
    nbytes: int
    status: Literal["good", "failed", "unreadable"]
    error: str | None = None


def verify(paths: Paths, *, option: StorageOptions = None, as_json: AsJson = False) -> None:
    """Read every byte of checkpoints and compare every checksum.

    Of a directory, this takes what is a checkpoint or looks like one: by the suffix .pt, .pth, .ckpt or .bin,
    or by its first bytes. The exit status is 0 if all are good, 1 if one is damaged or has no checksums, 2
    if one could not be read.

    Example: asyncckpt verify runs/gpt
    """
    verdicts = []
    for path in paths:
        for verdict in _verdicts(path, options_for(path, paths, option)):
            verdicts.append(verdict)
            if not as_json:
                _print(verdict)
    if as_json:
        print_json([asdict(verdict) for verdict in verdicts])
    elif len(verdicts) > 1:
        _print_summary(verdicts)
    statuses = {verdict.status for verdict in verdicts}
    if statuses != {"good"}:
        raise typer.Exit(_FAILED if "failed" in statuses else _UNREADABLE)


def _verdicts(path: str, option: Sequence[str] | None) -> Iterator[_Verdict]:
    try:
        store, files = files_at(path, option)
        if not files:
            raise CheckpointNotFoundError(f"there is no checkpoint in {path}")
    except (AsyncCkptError, OSError) as error:
        yield _Verdict(path, 0, "unreadable", message(error))
        return
    for number, file in enumerate(files, 1):
        yield _verified(store, file, f"{number}/{len(files)} {file.name}")


def _verified(store: Store, file: StoredFile, label: str) -> _Verdict:
    path = store.path_of(file.name)
    try:
        with bytes_progress(label, file.nbytes) as advance:
            get_engine().call(verify_file, store, file.name, advance)
    except CorruptCheckpointError as error:
        return _Verdict(path, file.nbytes, "failed", message(error))
    except (AsyncCkptError, OSError) as error:
        return _Verdict(path, file.nbytes, "unreadable", message(error))
    return _Verdict(path, file.nbytes, "good")


def _print(verdict: _Verdict) -> None:
    if verdict.status == "unreadable":
        complain(verdict.error or verdict.path)
    else:
        text = f"{verdict.status:<6} {size(verdict.nbytes):>8}  {verdict.error or verdict.path}"
        line(text, "red" if verdict.error else None)


def _print_summary(verdicts: Sequence[_Verdict]) -> None:
    counts = Counter(verdict.status for verdict in verdicts)
    parts = ", ".join(f"{count} {status}" for status, count in counts.items())
    line(f"{counted(len(verdicts), 'file')}, {size(sum(v.nbytes for v in verdicts))}: {parts}", "dim")
