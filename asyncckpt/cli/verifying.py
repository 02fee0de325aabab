"""`asyncckpt verify`: read whole files and compare every checksum."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from asyncckpt.cli import output
from asyncckpt.cli.formats import (
    DCP,
    dcp_files,
    foreign_format,
    is_dcp,
    is_safetensors,
    looks_like_checkpoint,
)
from asyncckpt.cli.locations import (
    Recursive,
    StorageOptions,
    call,
    file_at,
    nested_hint,
    options_for,
    stores_at,
)
from asyncckpt.errors import AsyncCkptError, CheckpointNotFoundError, CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncckpt.stores.base import Store, StoredFile

Paths = Annotated[list[str], typer.Argument(metavar="FILE|DIR", help="Local paths or URLs.")]

_STYLES = {"failed": "red", "unchecked": "yellow", "gone": "yellow"}
# The first of these that occurs decides.
_EXIT_STATUSES = {"failed": 1, "unreadable": 2, "good": 0}
_NOTHING_CHECKED = 3


class _Verdict(NamedTuple):
    path: str  # of a file, or of a directory that is one checkpoint
    nbytes: int
    status: str  # "good", "failed", "unreadable", "unchecked" or "gone"
    error: str | None = None  # why it is not good


def verify(
    paths: Paths,
    *,
    recursive: Recursive = False,
    option: StorageOptions = None,
    as_json: output.AsJson = False,
) -> None:
    """Read every byte of checkpoints and compare every checksum.

    In a directory, reads files that are checkpoints or look like one, by the suffix .pt, .pth, .ckpt, .bin or
    .safetensors, or by their first bytes. Formats without checksums to compare are reported as `unchecked`:
    safetensors, torch.save before 1.6, torch.distributed.checkpoint. A file that is removed or replaced while
    it is read is `gone`. Exit status: 0 if all checked files are good, 1 if one is damaged or was saved with
    its checksums off, 2 if one could not be read, 3 if there was nothing to check.

    Example: asyncckpt verify runs/gpt
    """
    verdicts = []
    for path in paths:
        for verdict in _verdicts(path, options_for(path, paths, option), recursive=recursive):
            verdicts.append(verdict)
            if not as_json:
                _print(verdict)
    counts = Counter(verdict.status for verdict in verdicts)
    if as_json:
        output.print_json([verdict._asdict() for verdict in verdicts])
    elif len(verdicts) > 1:
        total = output.size(sum(verdict.nbytes for verdict in verdicts))
        parts = ", ".join(f"{count} {status}" for status, count in counts.items())
        output.line(f"{output.counted(len(verdicts), 'file')}, {total}: {parts}", "dim")
    raise typer.Exit(next((n for status, n in _EXIT_STATUSES.items() if status in counts), _NOTHING_CHECKED))


def _verdicts(path: str, option: Sequence[str] | None, *, recursive: bool) -> Iterator[_Verdict]:
    """Yield the verdicts on a file, or on the files of a directory."""
    found = False
    try:
        for verdict in _of_path(path, option, recursive=recursive):
            found = True
            yield verdict
        if not found:
            hint = "" if recursive else nested_hint(path, option)
            raise CheckpointNotFoundError(f"there is no checkpoint in {path}{hint}")
    except (AsyncCkptError, OSError) as error:
        yield _Verdict(path, 0, "unreadable", output.message(error))


def _of_path(path: str, option: Sequence[str] | None, *, recursive: bool) -> Iterator[_Verdict]:
    try:
        store, file = file_at(path, option)
    except CheckpointNotFoundError:
        for below in stores_at(path, option, recursive=recursive, kind="file or directory"):
            yield from _of_directory(below)
    else:
        yield _verified(store, file, file.name)


def _of_directory(store: Store) -> Iterator[_Verdict]:
    listed = call(store.list)
    distributed = dcp_files(listed)
    if distributed:
        nbytes = sum(file.nbytes for file in distributed)
        yield _Verdict(store.path_of("").rstrip("/"), nbytes, "unchecked", f"a directory {DCP}")
    files = call(_checkpoints, store, [file for file in listed if file not in distributed])
    for number, file in enumerate(files, 1):
        yield _verified(store, file, f"{number}/{len(files)} {file.name}")


async def _checkpoints(store: Store, listed: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the files that are checkpoints or look like one, in order of their names."""
    from asyncckpt._loading.catalog import READERS
    from asyncckpt._threads import for_each

    found = []

    async def look(file: StoredFile) -> None:
        if is_safetensors(file.name) or is_dcp(file.name) or await looks_like_checkpoint(store, file):
            found.append(file)

    await for_each(look, listed, READERS)
    return sorted(found, key=lambda file: file.name)


def _verified(store: Store, file: StoredFile, label: str) -> _Verdict:
    from asyncckpt._loading.reader import verify_file

    path, nbytes = store.path_of(file.name), file.nbytes
    if is_dcp(file.name):
        return _Verdict(path, nbytes, "unchecked", f"a file of a directory {DCP}")
    try:
        with output.bytes_progress(label, nbytes) as advance:
            call(verify_file, store, file.name, advance)
    except CheckpointNotFoundError:
        return _Verdict(path, nbytes, "gone", "it was removed or replaced while it was read")
    except CorruptCheckpointError as error:
        foreign = call(foreign_format, store, file)
        if foreign is None:
            return _Verdict(path, nbytes, "failed", output.message(error))
        return _Verdict(path, nbytes, "unchecked", f"{foreign}, without checksums that verify can compare")
    except (AsyncCkptError, OSError) as error:
        return _Verdict(path, nbytes, "unreadable", output.message(error))
    return _Verdict(path, nbytes, "good")


def _print(verdict: _Verdict) -> None:
    text = verdict.error or verdict.path
    if verdict.status == "unreadable":
        output.complain(text)
        return
    if verdict.status in {"unchecked", "gone"}:
        text = f"{verdict.path}: {verdict.error}"
    output.line(f"{verdict.status:<9} {output.size(verdict.nbytes):>8}  {text}", _STYLES.get(verdict.status))
