"""The S3 server and the failing proxy that the tests of a store rely on."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import math
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from object_servers import (
    CREDENTIALS,
    FaultyProxy,
    MotoServer,
    Request,
    delay,
    drop,
    drop_answer,
    status,
    truncate,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from object_servers import Action

s3fs: Any = pytest.importorskip("s3fs")
exceptions: Any = pytest.importorskip("botocore.exceptions")
fsspec_asyn: Any = pytest.importorskip("fsspec.asyn")

MIB = 1024 * 1024
DATA = bytes(range(256)) * (20 * MIB // 256)
NO_RETRIES = {"max_attempts": 0}
RETRIES = {"mode": "standard", "total_max_attempts": 4}
SIGNED = {  # moto wants a signature, and takes any
    "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}

pytestmark = pytest.mark.timeout(60)


_numbers = itertools.count()


@pytest.fixture
def bucket(moto: MotoServer) -> str:
    return moto.make_bucket(f"bucket-{next(_numbers)}")


@contextlib.contextmanager
def client(proxy: FaultyProxy, retries: dict[str, Any], *, read_timeout: float = 10.0) -> Iterator[Any]:
    fs = s3fs.S3FileSystem(
        key=CREDENTIALS["aws_access_key_id"],
        secret=CREDENTIALS["aws_secret_access_key"],
        endpoint_url=proxy.url,
        skip_instance_cache=True,
        client_kwargs={"region_name": "us-east-1"},
        config_kwargs={"retries": retries, "read_timeout": read_timeout},
    )
    fs.retries = 1
    fs.connect()
    try:
        yield fs
    finally:
        fsspec_asyn.sync(fs.loop, fs._s3creator.__aexit__, None, None, None, timeout=10)


def call(fs: Any, operation: str, **arguments: Any) -> dict[str, Any]:
    answer: dict[str, Any] = fsspec_asyn.sync(fs.loop, fs._call_s3, operation, timeout=30, **arguments)
    return answer


def is_a(operation: str) -> Callable[[Request], bool]:
    return lambda request: request.operation == operation


def test_the_server_knows_buckets_objects_and_uploads() -> None:
    with MotoServer() as moto, FaultyProxy(moto.url) as proxy, client(proxy, NO_RETRIES) as fs:
        bucket = moto.make_bucket("to-be-forgotten")
        fs.pipe(f"{bucket}/a", b"12345")
        call(fs, "create_multipart_upload", Bucket=bucket, Key="b")
        assert moto.objects(bucket) == {"a": 5}
        assert moto.uploads(bucket) == ["b"]
        moto.reset()
        with pytest.raises(FileNotFoundError):
            call(fs, "put_object", Bucket=bucket, Key="a", Body=b"")


def test_large_objects_pass_through(proxy: FaultyProxy, moto: MotoServer, bucket: str) -> None:
    with client(proxy, NO_RETRIES) as fs:
        fs.pipe_file(f"{bucket}/a", DATA, chunksize=50 * MIB)
        assert fs.cat_file(f"{bucket}/a") == DATA
        assert fs.cat_file(f"{bucket}/a", start=5, end=10) == DATA[5:10]
    assert moto.objects(bucket) == {"a": len(DATA)}
    (put,) = proxy.seen("PutObject")
    assert (put.method, put.path, put.query) == ("PUT", f"/{bucket}/a", {})
    assert put.headers["host"] == proxy.url.removeprefix("http://")
    assert (put.nbytes, put.status) == (len(DATA), 200)


def test_multipart_uploads_pass_through(proxy: FaultyProxy, moto: MotoServer, bucket: str) -> None:
    with client(proxy, NO_RETRIES) as fs:
        fs.pipe_file(f"{bucket}/größe & co", DATA, chunksize=8 * MIB)
        assert fs.cat_file(f"{bucket}/größe & co") == DATA
    parts = proxy.seen("UploadPart")
    assert sorted((part.query["partNumber"], part.nbytes) for part in parts) == [
        ("1", 8 * MIB),
        ("2", 8 * MIB),
        ("3", 4 * MIB),
    ]
    assert {part.path for part in parts} == {f"/{bucket}/größe & co"}
    assert len(proxy.seen("CreateMultipartUpload")) == len(proxy.seen("CompleteMultipartUpload")) == 1
    assert moto.uploads(bucket) == []


def test_chunked_uploads_and_kept_connections(proxy: FaultyProxy, bucket: str) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)) as connection:
        connection.connect()
        sock = connection.sock
        pieces = (DATA[start : start + MIB] for start in range(0, 16 * MIB, MIB))
        connection.request("PUT", f"/{bucket}/a", body=pieces, headers=SIGNED, encode_chunked=True)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        for method, path, expected in [
            ("HEAD", "a", 200),
            ("GET", "missing", 404),
            ("DELETE", "a", 204),
            ("HEAD", "a", 404),
        ]:
            connection.request(method, f"/{bucket}/{path}", headers=SIGNED)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == expected
        assert connection.sock is sock
    assert proxy.seen("PutObject")[0].nbytes == 16 * MIB


def test_copies_and_listings_have_their_names(proxy: FaultyProxy, bucket: str) -> None:
    with client(proxy, NO_RETRIES) as fs:
        call(fs, "put_object", Bucket=bucket, Key="a", Body=b"1")
        call(fs, "copy_object", Bucket=bucket, Key="b", CopySource=f"{bucket}/a")
        call(fs, "list_objects_v2", Bucket=bucket)
        call(fs, "list_multipart_uploads", Bucket=bucket)
        call(fs, "delete_object", Bucket=bucket, Key="a")
        call(fs, "delete_objects", Bucket=bucket, Delete={"Objects": [{"Key": "b"}]})
        upload = call(fs, "create_multipart_upload", Bucket=bucket, Key="c")["UploadId"]
        call(fs, "list_parts", Bucket=bucket, Key="c", UploadId=upload)
        call(fs, "abort_multipart_upload", Bucket=bucket, Key="c", UploadId=upload)
    assert [request.operation for request in proxy.requests] == [
        "PutObject",
        "CopyObject",
        "ListObjectsV2",
        "ListMultipartUploads",
        "DeleteObject",
        "DeleteObjects",
        "CreateMultipartUpload",
        "ListParts",
        "AbortMultipartUpload",
    ]


# How often a request is repeated by aiohttp before its user hears of a lost connection.
TWICE_IF_PUT = 2


class Case(NamedTuple):
    action: Action
    times: int
    error: type[Exception]
    message: str


CASES = {
    "500": Case(status(500), 1, OSError, "told to fail"),
    "503": Case(status(503, "SlowDown", "reduce"), 1, OSError, "reduce"),
    "drop": Case(drop(), TWICE_IF_PUT, exceptions.ConnectionClosedError, "closed before"),
    "reset": Case(drop(reset=True), TWICE_IF_PUT, exceptions.EndpointConnectionError, "Could not connect"),
    "drop_answer": Case(drop_answer(), TWICE_IF_PUT, exceptions.ConnectionClosedError, "closed before"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_client_without_retries_sees_a_failure(proxy: FaultyProxy, bucket: str, case: Case) -> None:
    rule = proxy.fail(is_a("PutObject"), case.action, times=case.times)
    with client(proxy, NO_RETRIES) as fs:
        with pytest.raises(case.error, match=case.message):
            call(fs, "put_object", Bucket=bucket, Key="a", Body=DATA)
        assert rule.hits == len(proxy.seen("PutObject")) == case.times
        call(fs, "put_object", Bucket=bucket, Key="a", Body=DATA)
        assert fs.cat_file(f"{bucket}/a") == DATA


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_client_with_retries_survives_a_failure(proxy: FaultyProxy, bucket: str, case: Case) -> None:
    rule = proxy.fail(is_a("PutObject"), case.action, times=case.times)
    with client(proxy, RETRIES) as fs:
        call(fs, "put_object", Bucket=bucket, Key="a", Body=DATA)
        assert fs.cat_file(f"{bucket}/a") == DATA
    assert rule.hits == case.times
    assert len(proxy.seen("PutObject")) == case.times + 1


@pytest.mark.parametrize(("retries", "error"), [(NO_RETRIES, OSError), (RETRIES, None)])
def test_a_completion_may_fail_after_its_status(
    proxy: FaultyProxy, bucket: str, retries: dict[str, Any], error: type[Exception] | None
) -> None:
    proxy.fail(is_a("CompleteMultipartUpload"), status(200, "InternalError", "after all"))
    expected = pytest.raises(error, match="after all") if error else contextlib.nullcontext()
    with client(proxy, retries) as fs:
        with expected:
            fs.pipe_file(f"{bucket}/a", DATA, chunksize=8 * MIB)
        assert fs.exists(f"{bucket}/a") == (error is None)


def test_what_is_dropped_is_not_carried_out_but_what_lacks_its_answer_is(
    proxy: FaultyProxy, moto: MotoServer, bucket: str
) -> None:
    proxy.fail(is_a("CreateMultipartUpload"), drop())
    with client(proxy, NO_RETRIES) as fs:
        with pytest.raises(exceptions.ConnectionClosedError):
            call(fs, "create_multipart_upload", Bucket=bucket, Key="a")
        assert moto.uploads(bucket) == []
        proxy.fail(is_a("CreateMultipartUpload"), drop_answer())
        with pytest.raises(exceptions.ConnectionClosedError):
            call(fs, "create_multipart_upload", Bucket=bucket, Key="a")
        assert moto.uploads(bucket) == ["a"]
    assert [request.status for request in proxy.seen("CreateMultipartUpload")] == [None, None]


def test_a_truncated_answer_is_noticed(proxy: FaultyProxy, bucket: str) -> None:
    async def read(fs: Any) -> bytes:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key="a")
        async with answer["Body"] as body:
            data: bytes = await body.read()
            return data

    proxy.fail(is_a("GetObject"), truncate(100_000))
    with client(proxy, RETRIES) as fs:
        call(fs, "put_object", Bucket=bucket, Key="a", Body=DATA)
        # Its headers were fine, so that nothing but the reader itself can try again.
        with pytest.raises(s3fs.core.ClientPayloadError, match="received 100000 of"):
            fsspec_asyn.sync(fs.loop, read, fs, timeout=30)
        assert fsspec_asyn.sync(fs.loop, read, fs, timeout=30) == DATA


@pytest.mark.parametrize(("retries", "error"), [(NO_RETRIES, "ConnectionClosedError"), (RETRIES, None)])
def test_a_truncated_answer_that_is_parsed_is_like_a_lost_one(
    proxy: FaultyProxy, bucket: str, retries: dict[str, Any], error: str | None
) -> None:
    proxy.fail(is_a("ListObjectsV2"), truncate(20))
    expected = pytest.raises(getattr(exceptions, error)) if error else contextlib.nullcontext()
    with client(proxy, retries) as fs, expected:
        assert call(fs, "list_objects_v2", Bucket=bucket)["KeyCount"] == 0


@pytest.mark.parametrize("answer", [False, True])
def test_a_request_waits_for_a_gate(
    proxy: FaultyProxy, moto: MotoServer, bucket: str, *, answer: bool
) -> None:
    gate = threading.Event()
    rule = proxy.fail(is_a("PutObject"), delay(gate, answer=answer))
    with client(proxy, NO_RETRIES) as fs:
        arguments = {"Bucket": bucket, "Key": "a", "Body": b"1"}
        thread = threading.Thread(target=call, args=(fs, "put_object"), kwargs=arguments)
        thread.start()
        assert rule.reached.wait(10)
        if answer:
            deadline = time.monotonic() + 10
            while not moto.objects(bucket):
                assert time.monotonic() < deadline
        else:
            assert moto.objects(bucket) == {}
        assert thread.is_alive()
        gate.set()
        thread.join(10)
        assert not thread.is_alive()
    assert moto.objects(bucket) == {"a": 1}


@pytest.mark.parametrize(("retries", "error"), [(NO_RETRIES, "ReadTimeoutError"), (RETRIES, None)])
def test_a_client_does_not_wait_forever(
    proxy: FaultyProxy, bucket: str, retries: dict[str, Any], error: str | None
) -> None:
    gate = threading.Event()
    proxy.fail(is_a("ListObjectsV2"), delay(gate))
    expected = pytest.raises(getattr(exceptions, error)) if error else contextlib.nullcontext()
    try:
        with client(proxy, retries, read_timeout=0.5) as fs, expected:
            call(fs, "list_objects_v2", Bucket=bucket)
    finally:
        gate.set()
    assert len(proxy.seen("ListObjectsV2")) == (1 if error else 2)


def test_a_rule_is_for_some_of_the_requests_that_match(proxy: FaultyProxy, bucket: str) -> None:
    by_key = proxy.fail(lambda request: request.path.endswith("/a"), status(500), at=2, times=2)
    rest = proxy.fail(is_a("HeadObject"), status(403, "AccessDenied"), at=5, times=math.inf)
    proxy.fail(is_a("ListObjectsV2"), status(500))
    with client(proxy, NO_RETRIES) as fs:
        call(fs, "put_object", Bucket=bucket, Key="a", Body=b"")
        call(fs, "put_object", Bucket=bucket, Key="b", Body=b"")
        errors = []
        for key in "aaabbb":
            try:
                call(fs, "head_object", Bucket=bucket, Key=key)
                errors.append("")
            except OSError as error:
                errors.append(type(error).__name__)
        assert errors == ["OSError", "OSError", "", "", "PermissionError", "PermissionError"]
        assert (by_key.hits, rest.hits) == (2, 2)
        proxy.reset()
        assert proxy.requests == []
        call(fs, "list_objects_v2", Bucket=bucket)


def test_a_proxy_stops_with_a_request_held_back_and_a_server_that_is_gone() -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", timeout=10)) as connection:
        with FaultyProxy("127.0.0.1:9") as proxy:
            connection.port = proxy.port
            connection.request("GET", "/bucket/a")
            with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                connection.getresponse()
            rule = proxy.fail(is_a("GetObject"), delay(threading.Event()))
            connection.close()
            connection.request("GET", "/bucket/a")
            assert rule.reached.wait(10)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            connection.getresponse()
