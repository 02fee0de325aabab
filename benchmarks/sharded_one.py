"""Measure as one rank of a process group, and print this rank's samples as JSON.

`sharded.py` starts all ranks; it has to be the parent of each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from harness import Options
from peers.ranks import PEERS, REPLICATED
from sharded_beside import memory, steps
from sharded_loads import loads
from sharded_saves import replicated, sharded
from sharded_setting import Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from sharded_setting import Samples

MEASUREMENTS: dict[str, Callable[[Setting], Samples]] = {
    "saves": sharded,
    "steps": steps,
    "loads": loads,
    "memory": memory,
    "ddp": replicated,
}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("keys", nargs="*", choices=[*PEERS, *REPLICATED])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if arguments.device == "cpu" else "cpu:gloo,cuda:nccl")
    options = Options(arguments.directory, arguments.repeat, arguments.quick, arguments.device)
    setting = Setting(options, dist.new_group(backend="gloo"), arguments.keys)
    print(json.dumps(MEASUREMENTS[arguments.name](setting)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
