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
dist.init_process_group("gloo", init_method=f"file://{directory}-group", rank=rank, world_size=ranks)
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


def on_ranks(interpreter: Interpreter, tmp_path: Path, body: str, ranks: int = 2) -> list[Any]:
    """Run a program as each rank of a group; returns what each of them tells.

    Args:
        interpreter: starts the programs.
        tmp_path: in it is `directory`, of which the program may make a folder.
        body: the program. It has `rank`, `ranks`, `directory`, `told` and `attempt`.
        ranks: how many there are.
    """
    program = PREPARE + body + END
    running = [interpreter.start(program, rank, ranks, tmp_path / "run") for rank in range(ranks)]
    ends = [process.end() for process in running]
    assert [status for status, _, _ in ends] == [0] * ranks, ends
    return [json.loads(output) for _, output, _ in ends]
