"""Measure uploads to S3: asyncckpt, a bare `pipe` of s3fs, and Lightning's writer, of the same state.

`benchmarks/README.md` says what the columns mean.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

import machine
from asyncckpt._bench.place import exit_on_signals
from asyncckpt._bench.training import PlainCopy
from harness import forget_peak, run_apart, status, versions
from report import heading, markdown, seconds, size, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAYS = ("asyncckpt", "s3fs pipe", "Lightning")
LIMIT = 64 << 20  # bytes that a save may take beside the snapshot
CLIENT = {"key": "benchmark", "secret": "benchmark"}


def state_of(nbytes: int) -> dict[str, torch.Tensor]:
    """Return a state of tensors of 16 MiB."""
    return {f"p{i}": torch.randn(4 << 20) for i in range(max(nbytes >> 24, 1))}


def measure(way: str, endpoint: str, nbytes: int) -> dict[str, float]:
    """Upload once to get going and once to be measured; returns seconds and bytes."""
    state = state_of(nbytes)
    act = {"asyncckpt": ours, "s3fs pipe": pipe, "Lightning": lightnings}[way]
    options = CLIENT | {"endpoint_url": endpoint}
    copy = PlainCopy(state).run()
    return {"bytes": sum(tensor.nbytes for tensor in state.values()), "copy": copy} | act(
        state, f"s3://benchmark/{os.getpid()}", options
    )


def ours(state: dict[str, torch.Tensor], url: str, options: dict[str, Any]) -> dict[str, float]:
    """Save by a Checkpointer; the buffer of the snapshot is there before, and counted all the same."""
    from asyncckpt import Checkpointer  # noqa: PLC0415 - each way brings only what it needs

    with Checkpointer(url, storage_options=options) as ckpt:
        snapshot = ckpt.reserve(state)
        forget_peak()
        before = status("VmRSS")
        ckpt.save(0, state).committed.result()
        save = ckpt.save(1, state)
        save.committed.result()
        peak = status("VmHWM") - before + snapshot
        stats = save.stats
    with TemporaryDirectory(dir=Path.cwd()) as directory, Checkpointer(directory) as local:
        for step in range(2):
            on_disk = local.save(step, state)
            on_disk.committed.result()
    return {
        "seconds": stats.durable,
        "stall": stats.stall,
        "local": on_disk.stats.stall,
        "peak": peak,
        "snapshot": snapshot,
    }


def pipe(state: dict[str, torch.Tensor], url: str, options: dict[str, Any]) -> dict[str, float]:
    """Upload bytes that are there already: nothing is pickled, nothing is copied."""
    from s3fs import S3FileSystem  # noqa: PLC0415

    fs = S3FileSystem(**options)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    fs.pipe(f"{url}/first", data)
    return timed(lambda: fs.pipe(f"{url}/second", data))


def lightnings(state: dict[str, torch.Tensor], url: str, options: dict[str, Any]) -> dict[str, float]:
    """Save by the function that Lightning's TorchCheckpointIO uses."""
    from lightning.fabric.utilities.cloud_io import _atomic_save  # noqa: PLC0415

    os.environ |= {
        "AWS_ENDPOINT_URL": options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
    }
    _atomic_save(state, f"{url}/first")
    return timed(lambda: _atomic_save(state, f"{url}/second"))


def timed(act: Callable[[], object]) -> dict[str, float]:
    """Call something that blocks until it is done."""
    forget_peak()
    before = status("VmRSS")
    began = time.perf_counter()
    act()
    took = time.perf_counter() - began
    return {"seconds": took, "stall": took, "peak": status("VmHWM") - before, "snapshot": 0}


@contextmanager
def server() -> Iterator[str]:
    """Start an S3 server of moto in a process of its own; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            wait_for(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + 60
    pause = threading.Event()
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            pause.wait(0.1)
        else:
            return
    raise RuntimeError("moto does not answer; is it installed? pip install 'moto[server]'")


def draw(data: dict[str, Any]) -> str:
    """Return a Markdown table of a run."""
    rows = []
    for way, row in data["ways"].items():
        local = f" (to a disk: {seconds(row['local'])})" if "local" in row else ""
        snapshot = f", of that the snapshot {size(row['snapshot'])}" if row["snapshot"] else ""
        rate = f"{data['bytes'] / 1e6 / row['seconds']:.0f}"
        rows.append([way, rate, seconds(row["stall"]) + local, size(row["peak"]) + snapshot])
    columns = "", "MB/s until it is there", "training stands still", "peak memory over the live state"
    about = f"{size(data['bytes'])}, medians of {data['repeat']}; the bare copy takes {seconds(data['copy'])}"
    over = data["ways"]["asyncckpt"]["peak"] - data["ways"]["asyncckpt"]["snapshot"]
    verdict = "met" if over <= LIMIT else "MISSED"
    lines = [*heading(data), "", about, "", *markdown(columns, rows)]
    return "\n".join([*lines, "", f"Beside the snapshot: {over / 2**20:.0f} MiB ({verdict}: ≤ 64)"])


def main() -> None:
    """Measure each way in processes of their own, by turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "URL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    nbytes = options.megabytes << 20
    if options.measure:
        way, url = options.measure
        sys.stdout.write(json.dumps(measure(way, url, nbytes)) + "\n")
        return
    exit_on_signals()
    samples: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    began, described = time.perf_counter(), machine.describe(Path.cwd())
    arguments = ["--megabytes", str(options.megabytes)]
    for turn in range(options.repeat):
        for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
            with server() as url:  # a fresh one each: what it holds makes it slower
                create_bucket(url)
                for name, value in run_apart(__file__, *arguments, "--measure", way, url).items():
                    samples[way][name].append(value)
    data = {
        "machine": described | {"load_after": machine.load()},
        "seconds": time.perf_counter() - began,
        "versions": versions(),
        "repeat": options.repeat,
        "bytes": samples["asyncckpt"]["bytes"][0],
        "copy": median(samples["asyncckpt"]["copy"]),
        "ways": {way: {k: median(v) for k, v in found.items()} for way, found in samples.items()},
        "samples": samples,
    }
    write_json(options.json, data)
    sys.stdout.write(draw(data) + "\n")


def create_bucket(url: str) -> None:
    """Make the bucket."""
    from s3fs import S3FileSystem  # noqa: PLC0415

    S3FileSystem(**CLIENT, endpoint_url=url, skip_instance_cache=True).mkdir("benchmark")


if __name__ == "__main__":
    main()
