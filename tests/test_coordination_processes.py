"""Coordination of real processes: groups and their sub-groups, ranks and hosts that are killed or stopped."""

from __future__ import annotations

import json
import signal
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from programs import Interpreter
from rank_threads import tcp_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from programs import Program

IMPORTS = """\
import json, sys
import torch.distributed as dist
from asyncckpt._ranks.coordination import Coordination
from asyncckpt._ranks.group import ProcessGroup, process_group
from asyncckpt._ranks.round import Round
from asyncckpt.errors import RankError

rank, size, where = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def open_store():
    if not where.isdigit():
        return dist.FileStore(where, size)
    return dist.TCPStore("127.0.0.1", int(where), is_master=False, wait_for_workers=False)

def save(ranks, step):
    number = ranks.exchange(f"save({step})").number
    save = Round(ranks, number)
    plans = save.gather(b"%d" % ranks.rank)
    assert save.scatter(plans) == b"%d" % ranks.rank
    if ranks.leads:
        save.begin(f"folder-{step}")
        save.report(b"0")
        assert save.reports() == [b"%d" % rank for rank in range(ranks.size)]
        save.end("done")
        return f"folder-{step} done"
    folder = save.begun()
    save.report(b"%d" % ranks.rank)
    return f"{folder} {save.outcome()}"

"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as interpreter:
        yield interpreter


def ends(programs: list[Program]) -> list[Any]:
    """Return what each program has printed in the end."""
    results = [program.end() for program in programs]
    assert [status for status, _, _ in results] == [0] * len(programs), results
    return [json.loads(output) for _, output, _ in results]


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_a_group_and_a_sub_group_save(interpreter: Interpreter, tmp_path: Path, kind: str) -> None:
    host = tcp_store()
    script = """
        dist.init_process_group("gloo", store=open_store(), rank=rank, world_size=size)
        some = dist.new_group([1, 2])
        told = []
        ranks = Coordination(process_group(), "test", 60)
        told += [save(ranks, step) for step in range(5)]
        if rank:
            members = process_group(some)
            part = Coordination(members, "test", 60)
            told += [members.rank, members.size, save(part, 7)]
            part.close()
        ranks.exchange("end")
        ranks.close()
        dist.barrier()
        if rank == 0:
            told += [sum(key.startswith("asyncckpt") or "/asyncckpt/" in key for key in host.list_keys())
                     for host in [ranks.requests._store] if hasattr(host, "list_keys")]
        print(json.dumps(told))
        dist.destroy_process_group()
    """
    where = host.port if kind == "tcp" else tmp_path / "store"
    told = ends([interpreter.start(IMPORTS + textwrap.dedent(script), rank, 3, where) for rank in range(3)])
    saves = [f"folder-{step} done" for step in range(5)]
    assert told[0] in (saves, [*saves, 0])
    assert told[1:] == [[*saves, 0, 2, "folder-7 done"], [*saves, 1, 2, "folder-7 done"]]


HANGING = """
ranks = Coordination(ProcessGroup(open_store(), rank, size), "test", 3)
stop_at = sys.argv[4] if rank == int(sys.argv[5]) else ""

def hang(name):
    if name == stop_at:
        print("here", flush=True)
        sys.stdin.read()

told = []
try:
    hang("exchange")
    number = ranks.exchange("save(1)").number
    save = Round(ranks, number)
    hang("gather")
    plans = save.gather(b"")
    save.scatter(plans)
    save.begin("folder") if rank == 0 else save.begun()
    hang("report")
    save.report(b"")
    if rank == 0:
        save.reports()
        hang("end")
        save.end("done")
    else:
        save.outcome()
    told.append("done")
except RankError as error:
    told.append(str(error))
print(json.dumps(told), flush=True)
"""


@pytest.mark.parametrize(
    "case",
    [
        ("tcp", 2, "exchange", "rank 2 did not take part in save(1) within 3 s"),
        ("file", 2, "gather", "rank 2 had not sent its plan"),
        ("tcp", 2, "report", "rank 2 had not written its part"),
        ("file", 0, "report", "rank 0 had not written its part"),
        ("tcp", 0, "end", "the checkpoint may be committed"),
    ],
)
def test_a_killed_rank_is_named_by_all_others(
    interpreter: Interpreter, tmp_path: Path, case: tuple[str, int, str, str]
) -> None:
    kind, rank, point, message = case
    host = tcp_store()
    where = host.port if kind == "tcp" else tmp_path / "store"
    programs = [interpreter.start(IMPORTS + HANGING, each, 3, where, point, rank) for each in range(3)]
    killed = programs.pop(rank)
    assert killed.line() == "here"
    killed.kill()
    told = ends(programs)
    assert message in told[0][0]
    assert point == "end" or told[0] == told[1]
    killed.end()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "the store of the process group failed; has the process that hosts it"),
        (
            signal.SIGSTOP,
            "the store of the process group has not answered for ",
        ),
    ],
)
def test_a_host_of_the_store_that_is_killed_or_stopped_is_named(
    interpreter: Interpreter, number: signal.Signals, message: str
) -> None:
    host = interpreter.start("""
        import sys
        import torch.distributed as dist
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        print(store.port, flush=True)
        sys.stdin.read()
    """)
    where = host.line()
    programs = [interpreter.start(IMPORTS + HANGING, rank, 2, where, "report", 1) for rank in range(2)]
    assert programs[1].line() == "here"
    host.kill(number)
    programs[1].tell()
    told = ends(programs)
    host.kill()
    host.end()
    assert message in told[0][0]
    assert message in told[1][0]
