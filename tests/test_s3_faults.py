"""What passes is retried, what is final fails at once, and nothing broken is ever visible on S3."""

from __future__ import annotations

import itertools
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("moto")

import torch

import asyncckpt
from asyncckpt import BestK, Checkpointer, CorruptCheckpointError, LastN, SaveError, StoreError
from asyncckpt._saving.engine import get_engine
from asyncckpt.stores import open_store, s3
from object_servers import delay, drop, drop_answer, status, truncate
from support import run_python

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from object_servers import FaultyProxy, MotoServer, Request

count = itertools.count()
# Parts of 5 MiB: a state of some of them.
LARGE = 5 << 20


@pytest.fixture
def options(proxy: FaultyProxy) -> dict[str, Any]:
    return {"key": "k", "secret": "s", "endpoint_url": proxy.url}


@pytest.fixture
def url() -> str:
    return f"s3://bucket/run-{next(count)}"


def is_(operation: str) -> Callable[[Request], bool]:
    return lambda request: request.operation == operation


def is_bulk(request: Request) -> bool:
    return request.method == "GET" and int(request.headers.get("range", "0-0").split("-")[1]) > 1 << 20


def state_of(value: float, size: int = LARGE) -> dict[str, Any]:
    return {"x": torch.full((size,), value), "n": value}


def assert_holds(ckpt: Checkpointer, step: int, value: float) -> None:
    loaded = ckpt.load(step)
    assert loaded["n"] == value
    assert torch.equal(loaded["x"], state_of(value, len(loaded["x"]))["x"])


def test_a_run_is_saved_listed_evicted_and_resumed(url: str, options: dict[str, Any]) -> None:
    with Checkpointer(url, keep=BestK(2, "loss") | LastN(1), storage_options=options) as ckpt:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0]):
            ckpt.save(step, state_of(step, 100), metrics={"loss": loss})
    with Checkpointer(url, keep=BestK(2, "loss"), storage_options=options) as again:
        assert [checkpoint.step for checkpoint in again.checkpoints()] == [1, 2, 3]
        best = again.best()
        assert best is not None
        assert best.path == f"{url}/step-00000001.pt"
        again.verify("latest")
        state: dict[str, Any] = {"x": torch.zeros(100), "n": 0.0}
        found = again.restore(state)
        assert found is not None
        assert (found.step, state["n"], state["x"][0].item()) == (3, 3.0, 3.0)
        assert torch.equal(again.load(best.path)["x"], torch.ones(100))


@pytest.mark.parametrize("fault", [status(500), status(503, "SlowDown"), drop(), drop_answer()])
@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_what_passes_is_survived(
    url: str, options: dict[str, Any], proxy: FaultyProxy, operation: str, fault: Any
) -> None:
    with Checkpointer(url, storage_options=options) as ckpt:
        rule = proxy.fail(is_(operation), fault, times=2)
        ckpt.save(1, state_of(1.0))
        ckpt.wait()
        assert rule.hits == 2
        proxy.reset()
        assert_holds(ckpt, 1, 1.0)


def test_a_commit_whose_answer_was_lost_is_known_by_its_object(
    url: str, options: dict[str, Any], proxy: FaultyProxy
) -> None:
    with Checkpointer(url, storage_options=options) as ckpt:
        proxy.fail(is_("CompleteMultipartUpload"), drop_answer())
        proxy.fail(is_("CompleteMultipartUpload"), status(404, "NoSuchUpload"), at=2)
        ckpt.save(1, state_of(1.0))
        ckpt.wait()
        assert_holds(ckpt, 1, 1.0)


def test_a_commit_that_was_refused_is_none_though_another_object_is_there(
    url: str, options: dict[str, Any], proxy: FaultyProxy
) -> None:
    with Checkpointer(url, storage_options=options, overwrite=True) as ckpt:
        ckpt.save(1, state_of(1.0))
        ckpt.wait()
        proxy.fail(is_("CompleteMultipartUpload"), status(404, "NoSuchUpload"), times=9)
        ckpt.save(1, state_of(2.0))
        with pytest.raises(SaveError, match="completing the upload"):
            ckpt.wait()
        proxy.reset()
        assert_holds(ckpt, 1, 1.0)


@pytest.mark.parametrize("times", [1, 3])
def test_an_answer_that_is_cut_short_is_asked_for_again(
    url: str, options: dict[str, Any], proxy: FaultyProxy, times: int
) -> None:
    with Checkpointer(url, storage_options=options) as ckpt:
        ckpt.save(1, state_of(1.0))
        ckpt.wait()
        rule = proxy.fail(is_bulk, truncate(1000), times=times)
        assert_holds(ckpt, 1, 1.0)
        assert rule.hits == times


def test_a_save_that_fails_for_good_leaves_nothing_and_says_how_often_it_was_tried(
    url: str, options: dict[str, Any], proxy: FaultyProxy, moto: MotoServer
) -> None:
    before = set(moto.objects("bucket"))
    with Checkpointer(url, storage_options=options) as ckpt:
        proxy.fail(is_("UploadPart"), status(503, "SlowDown"), times=99)
        ckpt.save(1, state_of(1.0))
        with pytest.raises(SaveError, match=rf"uploading part \d+.*tried {s3.ATTEMPTS} times"):
            ckpt.wait()
        assert set(moto.objects("bucket")) == before
        assert [key for key in moto.uploads("bucket") if key.startswith(url[12:])] == []
        numbers = [request.query.get("partNumber") for request in proxy.seen("UploadPart")]
        assert all(numbers.count(number) <= s3.ATTEMPTS for number in numbers)
        proxy.reset()
        ckpt.save(2, state_of(2.0))
        ckpt.wait()
        assert_holds(ckpt, 2, 2.0)


def test_what_is_final_fails_at_once(url: str, options: dict[str, Any], proxy: FaultyProxy) -> None:
    with Checkpointer(url, storage_options=options) as ckpt:
        rule = proxy.fail(is_("UploadPart"), status(403, "AccessDenied"), times=99)
        ckpt.save(1, state_of(1.0))
        with pytest.raises(SaveError, match="check the credentials"):
            ckpt.wait()
        assert rule.hits <= 5  # one for each part that was under way


def test_what_dead_runs_left_is_aborted_once_it_is_old(
    url: str, options: dict[str, Any], moto: MotoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(url, options)
    assert isinstance(store, s3.S3Store)

    async def leave() -> None:
        await store.call("create_multipart_upload", f"{url[12:]}/left.pt")

    get_engine().call(leave)
    monkeypatch.setattr(s3, "ABANDONED_AFTER", float("inf"))
    Checkpointer(url, storage_options=options).close()
    assert f"{url[12:]}/left.pt" in moto.uploads("bucket")
    monkeypatch.undo()  # the server says of every upload that it is from 2010
    Checkpointer(url, storage_options=options).close()
    assert f"{url[12:]}/left.pt" not in moto.uploads("bucket")


def test_the_stall_does_not_wait_for_the_network(
    url: str, options: dict[str, Any], proxy: FaultyProxy
) -> None:
    with Checkpointer(url, storage_options=options) as ckpt:
        held = threading.Event()
        proxy.fail(is_("CreateMultipartUpload"), delay(held), times=1)
        save = ckpt.save(1, state_of(1.0))
        assert not save.committed.done()
        held.set()
        ckpt.wait()
        assert_holds(ckpt, 1, 1.0)


def test_a_flipped_bit_is_found(url: str, options: dict[str, Any]) -> None:
    with Checkpointer(url, storage_options=options) as ckpt:
        ckpt.save(1, state_of(1.0, 1000))
        ckpt.wait()
        fs = open_store(url, options)._fs  # type: ignore[attr-defined]
        path = f"{url[5:]}/step-00000001.pt"
        data = bytearray(fs.cat_file(path))
        data[2000] ^= 1
        fs.pipe_file(path, bytes(data))
        with pytest.raises(CorruptCheckpointError):
            ckpt.verify(1)


ONCE = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("s3://no-such-bucket/run", {}, "there is no bucket 'no-such-bucket'"),
        (
            "s3://bucket/run",
            {"kez": 1},
            "unexpected keyword argument 'kez'; check the names in storage_options",
        ),
        ("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9"} | ONCE, "check endpoint_url"),
        ("nosuch://bucket/run", {}, "nosuch"),
    ],
)
def test_what_is_wrong_is_said_when_the_checkpointer_is_made(
    options: dict[str, Any], where: str, change: dict[str, Any], message: str
) -> None:
    given = options | change if where.startswith("s3") else {}
    with pytest.raises(StoreError, match=message) as caught:
        Checkpointer(where, storage_options=given)
    assert "\n" not in str(caught.value)


def test_credentials_that_are_absent_are_asked_for(
    url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StoreError, match="give credentials in storage_options"):
        Checkpointer(url, storage_options={"endpoint_url": options["endpoint_url"]})


def test_a_missing_package_is_named() -> None:
    script = """
        import sys
        sys.modules["s3fs"] = None
        from asyncckpt import Checkpointer, StoreError
        try:
            Checkpointer("s3://bucket/run")
        except StoreError as error:
            print(error)
    """
    _, output, errors = run_python(script)
    assert "pip install s3fs" in output, errors


def test_a_program_that_ends_behind_a_save_uploads_it(
    url: str, options: dict[str, Any], moto: MotoServer
) -> None:
    script = """
        import json, sys, torch
        from asyncckpt import Checkpointer
        ckpt = Checkpointer(sys.argv[1], storage_options=json.loads(sys.argv[2]))
        ckpt.save(1, {"x": torch.zeros(5 << 20)})
    """
    status, _, errors = run_python(script, url, json.dumps(options))
    assert status == 0, errors
    assert f"{url[12:]}/step-00000001.pt" in moto.objects("bucket")


def test_files_without_a_checkpointer_go_there_too(
    url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    asyncckpt.save(state_of(1.0, 10), f"{url}/model.pt")
    asyncckpt.wait()
    assert asyncckpt.load(f"{url}/model.pt")["n"] == 1.0


def test_missing_rights_to_write_are_said_when_the_checkpointer_is_made(
    url: str, options: dict[str, Any], proxy: FaultyProxy
) -> None:
    proxy.fail(is_("CreateMultipartUpload"), status(403, "AccessDenied"))
    with pytest.raises(StoreError, match="check the credentials and what they may do"):
        Checkpointer(url, storage_options=options)
