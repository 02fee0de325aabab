"""Programs that run as two ranks of a process group."""

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

rank, directory = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{directory}-group", rank=rank, world_size=2)
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


def on_two_ranks(interpreter: Interpreter, tmp_path: Path, body: str) -> list[Any]:
    """Run a program as two ranks; returns what each of them tells."""
    running = [interpreter.start(PREPARE + body + END, rank, tmp_path / "run") for rank in range(2)]
    ends = [process.end() for process in running]
    assert [status for status, _, _ in ends] == [0, 0], ends
    return [json.loads(output) for _, output, _ in ends]
