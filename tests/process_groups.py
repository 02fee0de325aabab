"""Programs that run as the ranks of a process group."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from programs import Interpreter, Program

PREPARE = """\
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
import asyncckpt

rank, ranks, directory, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
store = dist.FileStore(f"{directory}-group", ranks)
if kind != "file":
    meeting, leads = store, kind == "tcp" and rank == 0
    port = 0 if leads else int(meeting.get("port") if kind == "tcp" else kind)
    store = dist.TCPStore("localhost", port, is_master=leads, wait_for_workers=False)
    if leads:
        meeting.set("port", str(store.port))
dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
told = []

def attempt(call, *args, **kwargs):
    try:
        result = call(*args, **kwargs)
    except asyncckpt.AsyncCkptError as error:
        told.append([type(error).__name__, str(error)])
    else:
        told.append(None)
        return result

"""
END = """
dist.barrier()
print(json.dumps(told))
dist.destroy_process_group()
"""


# What an interpreter imports beforehand for them, so that each rank begins at once.
MODULES = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "asyncckpt._saving.sharded_saves",
)


def on_ranks(
    interpreter: Interpreter, tmp_path: Path, body: str, ranks: int = 2, *, store: str = "file"
) -> list[Any]:
    """Run a program as each rank of a group; returns what each of them tells.

    Args:
        interpreter: starts the programs.
        tmp_path: in it is `directory`, of which the program may make a folder.
        body: the program. It has `rank`, `ranks`, `directory`, `told` and `attempt`.
        ranks: how many there are.
        store: of the group: a "file"; "tcp", in the process of rank 0; or the port of one that is there.
    """
    ends = [process.end() for process in start_ranks(interpreter, tmp_path, body + END, ranks, store=store)]
    assert [status for status, _, _ in ends] == [0] * ranks, ends
    return [json.loads(output) for _, output, _ in ends]


def start_ranks(
    interpreter: Interpreter, tmp_path: Path, body: str, ranks: int, *, store: str
) -> list[Program]:
    """Start a program as each rank of a group; the arguments are those of `on_ranks`."""
    return [interpreter.start(PREPARE + body, rank, ranks, tmp_path / "run", store) for rank in range(ranks)]
