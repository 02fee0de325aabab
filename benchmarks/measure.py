"""Run measurements in this process, and print their samples and the versions used as JSON.

`targets.py` and `gpu.py` start it for one at a time, so that none finds what another one has warmed up. What
fails is part of the result.
"""

from __future__ import annotations

import argparse
import json
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_saves import device_memory, lost, short
from harness import Options, versions
from measure_background import memory, steps
from measure_loads import loads
from measure_overlap import overlapped
from measure_saves import first_save, many_tensors, small, warm_saves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

GPU_TENSORS = 20_000

MEASUREMENTS: dict[str, Callable[[Options], Mapping[str, Sequence[Any]]]] = {
    "warm_saves": warm_saves,
    "first_reserved": partial(first_save, reserve=True),
    "first_unreserved": partial(first_save, reserve=False),
    "steps": steps,
    "memory": memory,
    "many_tensors": many_tensors,
    "small": small,
    "loads": loads,
    "overlapped": overlapped,
    "lost": lost,
    "short": short,
    "device_memory": device_memory,
    "gpu_tensors": partial(many_tensors, count=GPU_TENSORS),
}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    samples, errors = {}, {}
    for name in arguments.names:
        folder = arguments.directory / name
        folder.mkdir()
        options = Options(folder, arguments.repeat, arguments.quick, arguments.device)
        try:
            samples[name] = MEASUREMENTS[name](options)
        except Exception as error:  # noqa: BLE001 - told to whoever has started this
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"
    print(json.dumps({"samples": samples, "errors": errors, "versions": versions()}))


if __name__ == "__main__":
    main()
