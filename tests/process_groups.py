"""Programs that run as the ranks of a process group."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from programs import Interpreter

PREPARE = """\
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
import asyncckpt

rank, ranks, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.FileStore(f"{directory}-group", ranks)
if sys.argv[4] == "tcp":
    meeting, leads = store, rank == 0
    port = 0 if leads else int(meeting.get("port"))
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
MODULES = ("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "asyncckpt._saving.sharded_saves")


def on_ranks(
    interpreter: Interpreter, tmp_path: Path, body: str, ranks: int = 2, *, store: str = "file"
) -> list[Any]:
    """Run a program as each rank of a group; returns what each of them tells.

    Args:
        interpreter: starts the programs.
        tmp_path: in it is `directory`, of which the program may make a folder.
        body: the program. It has `rank`, `ranks`, `directory`, `told` and `attempt`.
        ranks: how many there are.
        store: of the group: a "file", or "tcp", in the process of rank 0.
    """
    program = PREPARE + body + END
    running = [interpreter.start(program, rank, ranks, tmp_path / "run", store) for rank in range(ranks)]
    ends = [process.end() for process in running]
    assert [status for status, _, _ in ends] == [0] * ranks, ends
    return [json.loads(output) for _, output, _ in ends]
