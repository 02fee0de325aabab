"""`asyncckpt verify`: read whole files and compare every checksum."""

from __future__ import annotations

from collections import Counter
from operator import methodcaller
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from asyncckpt.cli import output
from asyncckpt.cli.formats import (
    INCOMPLETE,
    foreign_format,
    has_data_files,
    is_data_file,
    is_safetensors,
    looks_like_checkpoint,
)
from asyncckpt.cli.locations import (
    Recursive,
    StorageOptions,
    call,
    checkpoint_at,
    nested_hint,
    options_for,
    stores_at,
)
from asyncckpt.errors import AsyncCkptError, CheckpointNotFoundError, CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asyncckpt.stores.base import Store, StoredFile

Paths = Annotated[list[str], typer.Argument(metavar="FILE|DIR", help="Local paths or URLs.")]

_STYLES = {"failed": "red", "unchecked": "yellow", "gone": "yellow"}
# The first of these that occurs decides.
_EXIT_STATUSES = {"failed": 1, "unreadable": 2, "good": 0}
_NOTHING_CHECKED = 3


class _Verdict(NamedTuple):
    path: str  # of a file, or of a folder with the files of many ranks
    nbytes: int
    status: str  # "good", "failed", "unreadable", "unchecked" or "gone"
    error: str | None = None  # why it is not good
    is_folder: bool = False


def verify(
    paths: Paths,
    *,
    recursive: Recursive = False,
    option: StorageOptions = None,
    as_json: output.AsJson = False,
) -> None:
    """Read every byte of checkpoints and compare every checksum.

    In a directory, reads files that are checkpoints or look like one, by the suffix .pt, .pth, .ckpt, .bin or
    .safetensors, or by their first bytes, and folders of asyncckpt and torch.distributed.checkpoint: all
    their items, and whether every tensor is there as a whole. What has no checksums to compare is reported as
    `unchecked`: safetensors, torch.save before 1.6, a folder that was not completed. What is removed or
    replaced while it is read is `gone`. Exit status: 0 if all that was checked is good, 1 if something is
    damaged or was saved with its checksums off, 2 if something could not be read, 3 if there was nothing to
    check.

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
        output.print_json([_as_json(verdict) for verdict in verdicts])
    elif len(verdicts) > 1:
        total = output.size(sum(verdict.nbytes for verdict in verdicts))
        parts = ", ".join(f"{count} {status}" for status, count in counts.items())
        kind = "checkpoint" if any(verdict.is_folder for verdict in verdicts) else "file"
        output.line(f"{output.counted(len(verdicts), kind)}, {total}: {parts}", "dim")
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
        store, file, is_folder = checkpoint_at(path, option)
    except CheckpointNotFoundError:
        for below in stores_at(path, option, recursive=recursive, kind="file or directory"):
            yield from _of_directory(below)
    else:
        yield (_verified_folder if is_folder else _verified)(store, file, file.name)


def _of_directory(store: Store) -> Iterator[_Verdict]:
    listed = call(store.list)
    if has_data_files(listed):
        ours = [file for file in listed if is_data_file(file.name)]
        nbytes, path = sum(file.nbytes for file in ours), store.path_of("").rstrip("/")
        yield _Verdict(path, nbytes, "unchecked", INCOMPLETE)
        listed = [file for file in listed if file not in ours]
    files, folders = call(_checkpoints, store, listed), call(store.list_folders)
    entries = [(file, _verified) for file in files] + [(folder, _verified_folder) for folder in folders]
    for number, (file, check) in enumerate(sorted(entries, key=lambda entry: entry[0].name), 1):
        yield check(store, file, f"{number}/{len(entries)} {file.name}")


async def _checkpoints(store: Store, listed: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the files that are checkpoints or look like one, in any order."""
    from asyncckpt._loading.catalog import READERS
    from asyncckpt._threads import for_each

    found = []

    async def look(file: StoredFile) -> None:
        if is_safetensors(file.name) or await looks_like_checkpoint(store, file):
            found.append(file)

    await for_each(look, listed, READERS)
    return found


def _verified(store: Store, file: StoredFile, label: str) -> _Verdict:
    from asyncckpt._loading.reader import verify_file

    path, nbytes = store.path_of(file.name), file.nbytes
    if is_data_file(file.name):
        return _Verdict(path, nbytes, "unchecked", "a file of a folder, which can be verified as a whole")

    def check() -> None:
        with output.bytes_progress(label, nbytes) as advance:
            call(verify_file, store, file.name, advance)

    verdict = _judged(_Verdict(path, nbytes, "good"), check)
    if verdict.status == "failed" and (foreign := call(foreign_format, store, file)) is not None:
        return _Verdict(path, nbytes, "unchecked", f"{foreign}, without checksums that verify can compare")
    return verdict


def _verified_folder(store: Store, folder: StoredFile, label: str) -> _Verdict:
    from asyncckpt.cli.folders import read_folder

    nbytes = sum(file.nbytes for file in call(store.folder(folder.name).list))

    def check() -> None:
        with output.bytes_progress(label, nbytes) as advance:
            call(read_folder, methodcaller("verify", advance), store, folder.name)

    return _judged(_Verdict(store.path_of(folder.name), nbytes, "good", is_folder=True), check)


def _judged(good: _Verdict, check: Callable[[], None]) -> _Verdict:
    """Return the verdict `good`, or another one if a check raises."""
    try:
        check()
    except CheckpointNotFoundError:
        return good._replace(status="gone", error="it was removed or replaced while it was read")
    except CorruptCheckpointError as error:
        return good._replace(status="failed", error=output.message(error))
    except (AsyncCkptError, OSError) as error:
        return good._replace(status="unreadable", error=output.message(error))
    return good


def _as_json(verdict: _Verdict) -> dict[str, Any]:
    path, nbytes, status, error, is_folder = verdict
    return {"path": path, "folder": is_folder, "nbytes": nbytes, "status": status, "error": error}


def _print(verdict: _Verdict) -> None:
    text = verdict.error or verdict.path
    if verdict.status == "unreadable":
        output.complain(text)
        return
    if verdict.status in {"unchecked", "gone"}:
        text = f"{verdict.path}: {verdict.error}"
    output.line(f"{verdict.status:<9} {output.size(verdict.nbytes):>8}  {text}", _STYLES.get(verdict.status))
