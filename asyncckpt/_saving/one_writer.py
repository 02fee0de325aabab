"""Let one rank write the checkpoints of a series that are not sharded; its results are those of all ranks."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import anyio
import torch

from asyncckpt._ranks.frames import packed, unpacked
from asyncckpt._ranks.requests import Requests
from asyncckpt._saving.targets import Target
from asyncckpt._stateful import CONTAINERS, is_stateful
from asyncckpt._threads import in_thread
from asyncckpt.errors import RankError, SaveError, SaveSkipped
from asyncckpt.types import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncckpt._ranks.group import ProcessGroup
    from asyncckpt._saving.request import SaveRequest
    from asyncckpt._saving.save import Save
    from asyncckpt._saving.saver import Saver
    from asyncckpt._saving.staging import Snapshot
    from asyncckpt._saving.targets import FileTarget
    from asyncckpt.types import SaveStats

# So many results stay in the store of the group, for ranks that are behind.
_KEPT = 64
_SHORTEST_PAUSE, _LONGEST_PAUSE = 1e-3, 0.2
_NAMED = 3  # entries in a message
_LEAVING = 10.0  # seconds that the writer waits at the end


class OneWriter:
    """Decides which rank writes, and tells the others what became of each save.

    That is rank 0 if it asked before the first save of any rank, else the rank of that save. The writer waits
    for nobody.

    Args:
        group: of the ranks.
        series: directory and template, the same on every rank. The k-th one of a series on each rank belong
            together.
        timeout: seconds that others wait for a result.
    """

    def __init__(self, group: ProcessGroup, series: str, timeout: float) -> None:
        self._rank = group.rank
        self._requests = Requests(group, f"files/{series}")
        self._timeout = timeout
        self._number = 0  # of the next save
        self._decided: int | None = None
        self._entries: dict[str, str] | None = None
        if group.rank == 0:
            self.writer()
        else:
            self.has_result(0)  # the first request counts them

    def writer(self) -> int:
        """Return the rank that writes; the first one to ask does."""
        if self._decided is None:
            self._decided = int(self._requests.swap("writer", None, str(self._rank).encode()))
        return self._decided

    def save(self, saver: Saver, request: SaveRequest, target: FileTarget, start: Callable[[], Save]) -> Save:
        """Save a file on the rank that writes; follow it on the others.

        Args:
            saver: of this rank.
            request: what is asked for.
            target: the file.
            start: starts the save; called on the rank that writes.
        """
        step = request.step
        number = self._next_save(request.state)
        if self.writer() != self._rank:
            saver.raise_failures("; the save that raised this was not started")
            followed = FollowedTarget(self, number, step, target, self._timeout)
            return saver.follow(followed, step, request.began)
        try:
            save = start()
        except BaseException as error:
            self._tell_failure(number, step, error)
            raise
        save.committed.add_done_callback(lambda _: self._tell_result(number, save))
        return save

    def _next_save(self, state: Any) -> int:
        """Return the number of a save that begins now; every rank counts its own."""
        number, self._number = self._number, self._number + 1
        if self._entries is None:
            self._entries = dict(_entries(state, "state", set()))
            if self.writer() == self._rank:
                self._put("entries", self._entries)
        return number

    def _tell_failure(self, number: int, step: int | None, error: BaseException) -> None:
        self._put_result(number, {"step": step, "error": f"{type(error).__name__}: {error}"})

    def _tell_result(self, number: int, save: Save) -> None:
        error = Future.exception(save.committed)  # which does not count as retrieved by the user
        result: dict[str, Any] = {"step": save.step, "skipped": isinstance(error, SaveSkipped)}
        if error is None:
            result["checkpoint"] = asdict(Future.result(save.committed))
        else:
            result["error"] = str(error)
        self._put_result(number, result)

    def _put_result(self, number: int, result: dict[str, Any]) -> None:
        self._put(str(number), {**result, "host": socket.gethostname()})
        if number >= _KEPT:
            with suppress(RankError):
                self._requests.delete(str(number - _KEPT))

    def _put(self, key: str, value: dict[str, Any]) -> None:
        with suppress(RankError):  # the file is written, whether the others learn of it or not
            for frame in packed(self._rank, json.dumps(value).encode()):
                self._requests.append(key, frame)

    def result(self, number: int, step: int | None) -> dict[str, Any]:
        """Wait for what the writer tells of a save; called on a worker thread.

        Raises:
            RankError: the writer tells nothing in time, saves another step, or lacks entries of this rank.
        """
        writer = self.writer()
        self._requests.add("waiting", 1)
        try:
            self._refuse_lost_entries(writer)
            result = self._get(str(number), writer, step)
        finally:
            with suppress(RankError):
                self._requests.add("waiting", -1)
        if result["step"] != step:
            raise RankError(
                f"rank {self._rank} saved step {step} where rank {writer}, which writes the files,"
                f" saved step {result['step']}; call save on every rank with the same steps"
            )
        return result

    def close(self) -> None:
        """Wait until the ranks that wait for a result have it, for a few seconds at most.

        The store ends with the process that hosts it, which is that of rank 0 as a rule.
        """
        if not self._number or self._decided != self._rank:
            return
        end, pause = time.monotonic() + min(self._timeout, _LEAVING), _SHORTEST_PAUSE
        with suppress(RankError):
            while int(self._requests.peek("waiting") or 0) and time.monotonic() < end:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def has_result(self, number: int) -> bool:
        """Return whether the writer has told what became of a save."""
        return self._requests.peek(str(number)) is not None

    def _refuse_lost_entries(self, writer: int) -> None:
        theirs = self._get("entries", writer, None)
        ours = self._entries or {}
        lost = [path for path, kind in ours.items() if theirs.get(path) != kind]
        if lost:
            more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
            raise RankError(
                f"rank {writer} writes the files of this series, and its state lacks"
                f" {', '.join(lost[:_NAMED])}{more} of rank {self._rank}; save with"
                " Checkpointer(sharded=True), which saves the state of every rank, or give each rank a"
                " filename of its own"
            )

    def _get(self, key: str, writer: int, step: int | None) -> dict[str, Any]:
        began, pause = time.monotonic(), _SHORTEST_PAUSE
        while (data := unpacked(self._requests.peek(key) or b"").get(writer)) is None:
            if time.monotonic() - began > self._timeout:
                what = "a first save" if step is None else f"its save of step {step}"
                raise RankError(
                    f"rank {writer}, which writes the files of this series, has told nothing of {what} for"
                    f" {self._timeout:g} s; the checkpoint may come to be"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        found: dict[str, Any] = json.loads(data)
        return found


class FollowedTarget(Target):
    """The file that another rank writes for this one.

    Args:
        writer: tells what became of it.
        number: of the save.
        step: of the save.
        target: the file, as this rank would write it.
        timeout: seconds after which what is not to be seen here is elsewhere.
    """

    def __init__(
        self, writer: OneWriter, number: int, step: int | None, target: FileTarget, timeout: float
    ) -> None:
        self.path = target.path
        self._writer = writer
        self._number = number
        self._step = step
        self._store = target.store
        self._timeout = timeout

    async def write(self, snapshot: Snapshot | None, stats: SaveStats) -> Checkpoint:
        """Return the checkpoint that the writer has written.

        Raises:
            SaveError: the writer has failed.
            SaveSkipped: the writer has skipped it.
            RankError: there is no result, or the file is not to be seen from here.
        """
        del snapshot, stats
        result = await in_thread(self._writer.result, self._number, self._step)
        if result.get("skipped"):
            raise SaveSkipped(str(result["error"]))
        if "error" in result:
            raise SaveError(f"the rank that writes it: {result['error']}")
        checkpoint = Checkpoint(**result["checkpoint"])
        if result["host"] != socket.gethostname():
            await self._refuse_unseen(checkpoint, result["host"])
        return checkpoint

    async def _refuse_unseen(self, checkpoint: Checkpoint, host: str) -> None:
        """Raise if the directory is not the one that the other host has written to."""
        end, pause = time.monotonic() + self._timeout, _SHORTEST_PAUSE
        while True:
            try:
                await self._store.stat(checkpoint.path.rpartition("/")[2])
            except FileNotFoundError:
                # A network file system may show it late; and it may be evicted once there is a newer one.
                if await in_thread(self._writer.has_result, self._number + 1):
                    return
            else:
                return
            if time.monotonic() > end:
                raise RankError(
                    f"{checkpoint.path} was written on {host} and is not to be seen on"
                    f" {socket.gethostname()}: the directory is not shared; save to a directory that all"
                    " hosts see, or give each rank a filename of its own"
                )
            await anyio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _entries(state: Any, path: str, met: set[int]) -> Iterator[tuple[str, str]]:
    """Yield path and kind of the tensors that a state holds itself, and of those of its modules."""
    if id(state) in met:
        return
    if isinstance(state, torch.nn.Module):
        for name, tensor in (*state.named_parameters(), *state.named_buffers()):
            yield f"{path}.{name}", f"{tuple(tensor.shape)} {tensor.dtype}"
    elif isinstance(state, torch.Tensor):
        yield path, f"{tuple(state.shape)} {state.dtype}"
    elif isinstance(state, CONTAINERS) and not is_stateful(state):
        met.add(id(state))
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from _entries(value, f"{path}[{key!r}]", met)
