"""An S3 server to test against, and a proxy in front of it that fails as a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from typing_extensions import Self

# Imported so because neither has types, and whoever has no S3 skips the tests that use it.
botocore_session: Any = pytest.importorskip("botocore.session")
pytest.importorskip("moto.server", reason="needs moto[server]")

CREDENTIALS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
_HOST = "127.0.0.1"
_PIECE = 256 * 1024
_ONLY_FOR_THE_NEXT_HOP = frozenset({"connection", "keep-alive", "proxy-connection", "expect"})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class MotoServer:
    """A moto S3 server in a process of its own. Takes seconds to start: one for a whole session.

    Attributes:
        port: where it listens, on 127.0.0.1.
        url: the endpoint for clients.
    """

    def __init__(self, *, patience: float = 60.0) -> None:
        self.port = 0
        self.url = ""
        self._patience = patience
        self._cleanup = contextlib.ExitStack()
        self._client: Any = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as cleanup:
            output = cleanup.enter_context(tempfile.TemporaryFile())
            deadline = time.monotonic() + self._patience
            process = self._start(output)
            cleanup.callback(lambda: _stop(process))
            while not self._answers():
                if process.poll() is not None:
                    # Another program may have taken the port since it was found free.
                    process = self._start(output)
                if time.monotonic() > deadline:
                    output.seek(0)
                    raise TimeoutError(f"moto does not answer: {output.read().decode(errors='replace')}")
                time.sleep(0.02)
            self._client = botocore_session.Session().create_client(
                "s3", region_name="us-east-1", endpoint_url=self.url, **CREDENTIALS
            )
            cleanup.callback(self._client.close)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket and return its name."""
        self._client.create_bucket(Bucket=name)
        return name

    def objects(self, bucket: str) -> dict[str, int]:
        """Return the sizes of all objects by key."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", [])}

    def uploads(self, bucket: str) -> list[str]:
        """Return the keys of the multipart uploads that are neither completed nor aborted."""
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
        return [entry["Key"] for page in pages for entry in page.get("Uploads", [])]

    def reset(self) -> None:
        """Forget all buckets."""
        self._request("POST", "/moto-api/reset")

    def _start(self, output: Any) -> subprocess.Popen[bytes]:
        self.port = _free_port()
        self.url = f"http://{_HOST}:{self.port}"
        command = [sys.executable, "-m", "moto.server", "-H", _HOST, "-p", str(self.port)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def _answers(self) -> bool:
        try:
            self._request("GET", "/")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _request(self, method: str, path: str) -> None:
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=self._patience)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise ConnectionError(f"{method} {path}: {answer.status}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass
class Request:
    """A request as the proxy saw it.

    Attributes:
        path: decoded, without the query.
        query: a parameter without a value has the empty string for one.
        headers: by lower-cased name.
        nbytes: the length of the body as far as it was read.
        status: what was answered; None while, or if, nothing was.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    nbytes: int = 0
    status: int | None = None

    @property
    def operation(self) -> str:
        """The name of the S3 operation, for the ones on objects and listings: "UploadPart"."""
        copies = "x-amz-copy-source" in self.headers
        if not self.path.strip("/").partition("/")[2]:
            get = "ListMultipartUploads" if "uploads" in self.query else "ListObjectsV2"
            names = {"GET": get, "HEAD": "HeadBucket", "PUT": "CreateBucket", "POST": "DeleteObjects"}
        elif "uploads" in self.query:
            names = {"POST": "CreateMultipartUpload"}
        elif "uploadId" in self.query:
            put = "UploadPartCopy" if copies else "UploadPart"
            end = {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
            names = {"GET": "ListParts", "PUT": put, **end}
        else:
            put = "CopyObject" if copies else "PutObject"
            names = {"PUT": put, "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
        return names.get(self.method, self.method)


@dataclass(frozen=True)
class _Status:
    status: int
    code: str
    message: str


@dataclass(frozen=True)
class _Drop:
    reset: bool


@dataclass(frozen=True)
class _DropAnswer:
    pass


@dataclass(frozen=True)
class _Truncate:
    nbytes: int


@dataclass(frozen=True)
class _Delay:
    gate: threading.Event
    answer: bool

    async def hold(self) -> None:
        while not self.gate.is_set():  # noqa: ASYNC110 - it is set by another thread
            await asyncio.sleep(0.005)


Action = _Status | _Drop | _DropAnswer | _Truncate | _Delay


def status(status: int, code: str = "InternalError", message: str = "told to fail") -> Action:
    """Read the request, then answer it with an error in S3's form; the server never sees it.

    With status 200 it is the error that S3 may put into the answer of a completion or a copy.
    """
    return _Status(status, code, message)


def drop(*, reset: bool = False) -> Action:
    """Close the connection after the headers of the request, orderly or with a reset."""
    return _Drop(reset)


def drop_answer() -> Action:
    """Let the server carry the request out, then close the connection without its answer."""
    return _DropAnswer()


def truncate(nbytes: int) -> Action:
    """Pass on the headers of the answer and the first bytes of its body, then close the connection."""
    return _Truncate(nbytes)


def delay(gate: threading.Event, *, answer: bool = False) -> Action:
    """Hold the request back after its headers, or else its answer, until the gate is set."""
    return _Delay(gate, answer)


@dataclass
class Rule:
    """What happens to some of the requests that match.

    Attributes:
        hits: how many requests it took effect on.
        reached: set as soon as it takes effect for the first time.
    """

    match: Callable[[Request], bool]
    action: Action
    first: int
    last: float
    matched: int = 0
    hits: int = 0
    reached: threading.Event = field(default_factory=threading.Event)

    def concerns(self, request: Request) -> bool:
        """Count a request; return whether the rule is for this one."""
        if not self.match(request):
            return False
        self.matched += 1
        return self.first <= self.matched <= self.last

    def take(self) -> Action:
        """Note that the rule takes effect, and return how."""
        self.hits += 1
        self.reached.set()
        return self.action


@dataclass(frozen=True)
class _Head:
    """The first line and the headers of a request or an answer, as they were sent and as a dict."""

    start: bytes
    lines: list[bytes]
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> _Head:
        raw = await reader.readuntil(b"\r\n\r\n")
        start, *lines = raw[:-4].split(b"\r\n")
        pairs = [line.decode("latin-1").partition(":") for line in lines]
        return cls(start, lines, {name.lower(): value.strip() for name, _, value in pairs})

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def framed(self) -> bool:
        """Whether it says itself where its body ends."""
        return self.chunked or "content-length" in self.headers

    def encoded(self, *, closes: bool) -> bytes:
        """Return it as it goes to the next hop: unchanged, except for what is about this hop."""
        kept = [
            line
            for line in self.lines
            if line.partition(b":")[0].decode("latin-1").lower() not in _ONLY_FOR_THE_NEXT_HOP
        ]
        if closes:
            kept.append(b"Connection: close")
        return b"\r\n".join([self.start, *kept, b"", b""])

    async def body(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """Read the body that follows, without the framing of chunks."""
        if self.chunked:
            while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                async for piece in _exactly(reader, size):
                    yield piece
                await reader.readexactly(2)
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
        elif self.framed:
            async for piece in _exactly(reader, int(self.headers["content-length"])):
                yield piece
        else:
            while piece := await reader.read(_PIECE):
                yield piece

    async def pass_on(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        """Write a piece of the body, framed as the headers say; an empty one ends it."""
        if not self.chunked:
            writer.write(piece)
        else:
            writer.write(b"%x\r\n" % len(piece))
            writer.write(piece)
            writer.write(b"\r\n")
        await writer.drain()


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, _PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


class FaultyProxy:
    """Forwards HTTP/1.1 to a server, records the requests, and fails those that a test names.

    Mind that aiohttp, and so every client over aiobotocore, repeats an idempotent request (all but POST) once
    by itself when the connection is closed before an answer: for a failure to be seen, drop it twice.

    Attributes:
        port: where it listens, on 127.0.0.1.
        url: the endpoint for clients.
        requests: all that were seen, in the order of their arrival.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target if "//" in target else f"//{target}")
        self._target = (parts.hostname or _HOST, parts.port or 80)
        self.port = 0
        self.url = ""
        self.requests: list[Request] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="FaultyProxy")
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Event

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(10) or not self.port:
            raise TimeoutError("the proxy does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def fail(
        self, match: Callable[[Request], bool], action: Action, *, at: int = 1, times: float = 1
    ) -> Rule:
        """Apply `action` to the `at`-th request that matches, and to `times` in all from there on.

        Of several rules for one request the one added first takes effect; all of them count it.
        `math.inf` is a number of times.
        """
        rule = Rule(match, action, at, at + times - 1)
        with self._lock:
            self._rules.append(rule)
        return rule

    def reset(self) -> None:
        """Forget all rules and requests. A request that is held back stays so until its gate is set."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def seen(self, operation: str) -> list[Request]:
        """Return the requests of one S3 operation."""
        with self._lock:
            return [request for request in self.requests if request.operation == operation]

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await self._serve(reader, writer)
            finally:
                tasks.discard(task)

        try:
            server = await asyncio.start_server(serve, _HOST, 0, limit=4 * _PIECE)
            self.port = server.sockets[0].getsockname()[1]
            self.url = f"http://{_HOST}:{self.port}"
        finally:
            self._started.set()
        await self._stopping.wait()
        server.close()
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # one of the two hung up, which is for the other one to see
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            await _close(writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Carry one request and its answer; return whether the connection stays."""
        head = await _Head.read(reader)
        request, action = self._admit(head)
        if isinstance(action, _Drop):
            await _hang_up(reader, writer, reset=action.reset)
            return False
        if isinstance(action, _Delay) and not action.answer:
            await action.hold()
        if head.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        stays = head.headers.get("connection", "").lower() != "close"
        if isinstance(action, _Status):
            if head.framed:
                async for piece in head.body(reader):
                    request.nbytes += len(piece)
            request.status = action.status
            writer.writelines(_error(action, request, closes=not stays))
            await writer.drain()
            return stays
        upstream, up = await asyncio.open_connection(*self._target, limit=4 * _PIECE)
        try:
            await _forward(request, head, reader, up)
            return await _answer(request, action, upstream, writer, stays=stays)
        finally:
            await _close(up)

    def _admit(self, head: _Head) -> tuple[Request, Action | None]:
        method, target, _ = head.start.decode("latin-1").split(" ")
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        request = Request(method, unquote(parts.path), query, head.headers)
        with self._lock:
            self.requests.append(request)
            concerned = [rule for rule in self._rules if rule.concerns(request)]
            return request, concerned[0].take() if concerned else None


async def _forward(
    request: Request, head: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(head.encoded(closes=True))
    if head.framed:
        async for piece in head.body(reader):
            request.nbytes += len(piece)
            await head.pass_on(piece, writer)
        await head.pass_on(b"", writer)
    await writer.drain()


async def _answer(
    request: Request,
    action: Action | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    stays: bool,
) -> bool:
    if isinstance(action, _Delay) and action.answer:
        await action.hold()
    head = await _Head.read(reader)
    while (code := int(head.start.split(b" ")[1])) < 200:
        head = await _Head.read(reader)
    empty = request.method == "HEAD" or code in {204, 304}
    stays = stays and (head.framed or empty)
    left = action.nbytes if isinstance(action, _Truncate) else None
    if not isinstance(action, _DropAnswer):
        request.status = code
        writer.write(head.encoded(closes=not stays))
    async for piece in _exactly(reader, 0) if empty else head.body(reader):
        if isinstance(action, _DropAnswer):
            continue
        part = piece if left is None else piece[:left]
        if part:
            await head.pass_on(part, writer)
        if left is not None:
            left -= len(part)
    if action is not None and not isinstance(action, _Delay):
        return False
    if not empty:
        await head.pass_on(b"", writer)
    await writer.drain()
    return stays


def _error(action: _Status, request: Request, *, closes: bool) -> Iterable[bytes]:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{action.code}</Code><Message>{action.message}</Message>"
        "<RequestId>0123456789ABCDEF</RequestId></Error>"
    ).encode()
    reason = http.client.responses.get(action.status, "Error")
    yield f"HTTP/1.1 {action.status} {reason}\r\nContent-Type: application/xml\r\n".encode()
    yield b"Content-Length: %d\r\n%s\r\n" % (len(body), b"Connection: close\r\n" if closes else b"")
    yield b"" if request.method == "HEAD" else body


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return
    # A connection that is closed with unread bytes is reset: let the client send what it likes first.
    writer.write_eof()
    while await reader.read(_PIECE):
        pass


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
