"""A directory of an S3 bucket: one object a checkpoint, uploaded in parallel parts, visible when complete."""

# ruff: noqa: D102 - methods without a docstring do what `Store`, `Draft` and `OpenFile` say

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import random
import secrets
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import CancelScope, fail_after

from asyncckpt._checksum import crc32
from asyncckpt.errors import StoreError
from asyncckpt.stores.base import Draft
from asyncckpt.stores.errors import remote_errors
from asyncckpt.stores.remote import ABANDONED_AFTER, RemoteStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

T = TypeVar("T")

logger = logging.getLogger("asyncckpt")

# How often a request is made at most, with jitter between: the client's own "standard" retries.
ATTEMPTS = 6
_PART = 5 << 20  # the least that a part may have: what is under way is in memory a second time, and a third
_PARTS = 10_000  # the most that an upload may have
_PAGE = 4096
_REMOVED_AT_ONCE = 1000  # the most that a request may name
_CUT_SHORT = frozenset({"ClientPayloadError", "IncompleteRead", "ServerDisconnectedError", "ClientOSError"})
# Seconds for a part: no timeout of the client's covers a server that stops reading.
_DEADLINE = 300.0
_MARK = "asyncckpt-save"


def client_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of s3fs, with those of its client that saves need unless they are given."""
    config = {
        "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
        "connect_timeout": 10,
        "read_timeout": 60,
        # Each part brings the CRC-32 that we have made of it: another hash would take longer than sending it.
        "request_checksum_calculation": "when_required",
        "s3": {"payload_signing_enabled": False},
    }
    return options | {"config_kwargs": config | options.get("config_kwargs", {}), "use_listings_cache": False}


class S3Store(RemoteStore):
    """A prefix of a bucket, through s3fs's client."""

    async def call(self, method: str, key: str | None = None, **arguments: Any) -> Any:
        """Call an operation of the S3 client on the bucket."""
        bucket, _, _ = self._root.partition("/")
        if key is not None:
            arguments["Key"] = key
        coroutine = self._fs._call_s3(method, Bucket=bucket, **arguments)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop))

    @asynccontextmanager
    async def draft(self, name: str, size: int) -> AsyncIterator[Draft]:
        _, _, key = self._path(name).partition("/")
        draft = S3Draft(self, key, size, self.path_of(name))
        try:
            with remote_errors(f"writing {name}", self._given):
                await draft.open()
            yield draft
        finally:
            with CancelScope(shield=True):
                await draft.drop()

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on; an answer that is cut short is asked for again."""
        await _repeated(partial(super().read, name, offset, into))

    async def read_all(self, name: str) -> bytes:
        """Return what a file holds, or nothing if there is none; what is cut short is read again."""
        return await _repeated(partial(super().read_all, name))

    async def remove_files(self, names: Iterable[str]) -> None:
        """Remove objects, a thousand with a request; those that do not exist are no error."""
        keys = [self._path(name).partition("/")[2] for name in names]
        for start in range(0, len(keys), _REMOVED_AT_ONCE):
            objects = [{"Key": key} for key in keys[start : start + _REMOVED_AT_ONCE]]
            answer = await self.call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            for error in answer.get("Errors") or []:
                message = f"{error['Key']} was not removed: {error.get('Message') or error.get('Code')}"
                raise StoreError(errno.EIO, message, self._given)
        self.changed()

    async def _prepare(self) -> None:
        _, _, prefix = self._root.partition("/")
        try:
            await self.call("head_bucket")
        except FileNotFoundError as error:
            bucket, _, _ = self._root.partition("/")
            msg = f"there is no bucket {bucket!r}; make it, or correct the URL or the endpoint"
            raise StoreError(errno.ENOENT, msg, self._given) from error
        # The right to write is asked for now, not an hour later: by an upload that is given up at once.
        probe = f"{prefix}/.{secrets.token_hex(8)}.asyncckpt-probe".lstrip("/")
        upload = await self.call("create_multipart_upload", probe)
        await self.call("abort_multipart_upload", probe, UploadId=upload["UploadId"])
        try:
            await self._abort_abandoned(f"{prefix}/".lstrip("/"))
            await self._remove_abandoned()
        except PermissionError as error:
            logger.warning("%s: what crashed runs left cannot be listed: %s", self._given, error)

    async def _abort_abandoned(self, prefix: str) -> None:
        """Abort multipart uploads of crashed runs: they are billed, and not listed anywhere else."""
        page: dict[str, Any] = {}
        while True:
            answer = await self.call("list_multipart_uploads", Prefix=prefix, **page)
            for upload in answer.get("Uploads") or []:
                if time.time() - upload["Initiated"].timestamp() > ABANDONED_AFTER:
                    logger.info("aborting the upload of %s, which a crashed writer left", upload["Key"])
                    await self.call("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])
            if not answer.get("IsTruncated"):
                return
            page = {name: answer[f"Next{name}"] for name in ("KeyMarker", "UploadIdMarker")}


class S3Draft(Draft):
    """A multipart upload, or a single request where one part is all."""

    writers = 5

    def __init__(self, store: S3Store, key: str, size: int, path: str) -> None:
        self._store = store
        self._key = key
        self._path = path
        self._token = secrets.token_hex(16)
        # A part is copied to be sent, and again by the socket: that is what is taken beside the snapshot.
        self.chunk = max(_PART, -(-size // (_PARTS * _PAGE)) * _PAGE)
        self._upload: str | None = None
        self._whole = memoryview(b"")
        self._parts: dict[int, dict[str, Any]] = {}
        self._size = size
        self._written = 0

    async def open(self) -> None:
        """Begin the upload."""
        if self._size > self.chunk:
            answer = await self._store.call(
                "create_multipart_upload",
                self._key,
                ChecksumAlgorithm="CRC32",
                Metadata={_MARK: self._token},
            )
            self._upload = answer["UploadId"]

    async def write(self, offset: int, data: memoryview) -> None:
        self._written += len(data)
        if self._upload is None:
            self._whole = data
            return
        number, checksum = offset // self.chunk + 1, _checksum(data)
        with remote_errors(f"uploading part {number}", self._path), fail_after(_DEADLINE):
            answer = await self._store.call(
                "upload_part",
                self._key,
                UploadId=self._upload,
                PartNumber=number,
                Body=bytes(data),
                ChecksumCRC32=checksum,
            )
        self._parts[number] = {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": checksum}

    async def commit(self) -> None:
        """Complete the upload: from then on the object is there, whole and durable."""
        began = time.perf_counter()
        if self._written != self._size:
            message = f"{self._written} of {self._size} bytes were written; it is not committed"
            raise StoreError(errno.EINVAL, message, self._path)
        with remote_errors("completing the upload", self._path):
            if self._upload is None:
                body, checksum = bytes(self._whole), _checksum(self._whole)
                await self._store.call("put_object", self._key, Body=body, ChecksumCRC32=checksum)
            else:
                await self._complete(self._upload)
        self._upload = None
        self._store.changed()
        self.sync_seconds = time.perf_counter() - began

    async def drop(self) -> None:
        """Abort what is not committed."""
        if self._upload is None:
            return
        upload, self._upload = self._upload, None
        try:
            await self._store.call("abort_multipart_upload", self._key, UploadId=upload)
        except FileNotFoundError:
            return  # it is gone
        except Exception as error:  # noqa: BLE001 - what made it fail matters more, and it is not visible
            logger.warning("%s: the broken upload could not be aborted: %s", self._path, error)

    async def _complete(self, upload: str) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        try:
            await self._store.call(
                "complete_multipart_upload", self._key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except FileNotFoundError:
            # The answer to an earlier attempt was lost: it may have been done. The object tells.
            there = await self._store.call("head_object", self._key)
            if there["Metadata"].get(_MARK) != self._token:
                raise


async def _repeated(read: Callable[[], Awaitable[T]]) -> T:
    """Read again what was cut short: the client's own retries end where the body of an answer begins."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return await read()
        except StoreError as error:
            if type(error.__cause__).__name__ not in _CUT_SHORT:
                raise
            await asyncio.sleep(random.random() * min(2**attempt, 20))  # noqa: S311 - jitter
    return await read()


def _checksum(data: memoryview) -> str:
    return base64.b64encode(crc32(data).to_bytes(4, "big")).decode()
