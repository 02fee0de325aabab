"""Run measurements in this process, and print their samples and the versions used as JSON.

`targets.py` starts it for one at a time, so that none finds what another one has warmed up.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Options, Samples, versions
from measure_background import memory, steps
from measure_loads import loads
from measure_saves import first_save, many_tensors, small, warm_saves

if TYPE_CHECKING:
    from collections.abc import Callable

MEASUREMENTS: dict[str, Callable[[Options], Samples]] = {
    "warm_saves": warm_saves,
    "first_reserved": partial(first_save, reserve=True),
    "first_unreserved": partial(first_save, reserve=False),
    "steps": steps,
    "memory": memory,
    "many_tensors": many_tensors,
    "small": small,
    "loads": loads,
}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="+", choices=MEASUREMENTS)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    samples = {}
    for name in arguments.names:
        folder = arguments.directory / name
        folder.mkdir()
        samples[name] = MEASUREMENTS[name](Options(folder, arguments.repeat, arguments.quick))
    print(json.dumps({"samples": samples, "versions": versions()}))


if __name__ == "__main__":
    main()
