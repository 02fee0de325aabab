"""Measure what the coordination of a save costs with many ranks: real messages, simulated ranks.

    python benchmarks/coordination.py --ranks 4 64 --json coordination.json

A process hosts a real TCPStore, two others make the requests of all ranks but rank 0, phase by phase, as fast
as they can, and the main process is rank 0. Columns, for the part of a save on the training thread (the
exchange; for the first save also the plan, of 300 tensors that FSDP2 shards) and in the background:

- rank 0, another rank: requests, bytes of keys and values in both directions, time of rank 0;
- store: processor time of the process that hosts the store, which answers one request after the other. This
  is what limits it at 16,384 ranks: no exchange is faster. Beyond that it takes a tree, a store a host;
- all: from the first request to the last; here the simulated ranks share the cores with the store;
- stock DCP: bytes and time of rank 0 for its planning, which it repeats for each save by default: to unpickle
  the plans, `create_global_plan`, to pickle the results. Beyond 1,024 ranks it is scaled up from 1,024.

Requests that a rank repeats while it waits for others are not in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import machine
from coordination_ranks import REPORT, Ranks, host, work
from coordination_stock import TENSORS, stock
from report import markdown, seconds, size, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection

    from asyncckpt._ranks.round import Round

WORKERS = 2  # processes that make the requests of the other ranks


class Simulation:
    """All ranks of a group, and the host of their store."""

    def __init__(self, total: int) -> None:
        self._total = total
        context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []

        def start(func: Callable[..., None], *args: Any) -> Connection:
            ours, theirs = context.Pipe()
            process = context.Process(target=func, args=(theirs, *args), daemon=True)
            process.start()
            self._processes.append(process)
            return ours

        self._host = start(host)
        port = self._host.recv()
        workers = min(WORKERS, total - 1)
        self._workers = [
            start(work, port, range(1 + first, total, workers), total) for first in range(workers)
        ]
        self._ranks = Ranks(port, [0], total)
        for worker in self._workers:
            worker.recv()

    def save(self, number: int) -> dict[str, float]:
        """Make a save, and return what it cost; the first one is planned."""
        costs: defaultdict[str, float] = defaultdict(float)
        self._others("training", costs, "come", number)
        self._lead("training", costs, lambda ranks: ranks.act("come", number))
        self._others("training", costs, "learn", number)
        self._lead("training", costs, lambda ranks: ranks.act("learn", number))
        save = self._ranks.rounds[0]
        if number == 0:
            self._others("training", costs, "gather", number)
            self._lead("training", costs, lambda ranks: self._plan(save, ranks.plan))
            self._others("training", costs, "scatter", number)
        self._lead("background", costs, lambda _: save.begin(f"step-{number:08d}"))
        self._others("background", costs, "write", number)
        self._lead("background", costs, lambda _: self._commit(save))
        self._others("background", costs, "end", number)
        return dict(costs)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.send(None)
        self._host.send(None)
        for process in self._processes:
            process.join()

    def _plan(self, save: Round, plan: bytes) -> None:
        plans = save.gather(plan)
        assert plans is not None
        save.scatter([bytes(TENSORS)] * len(plans))  # which of its items a rank keeps

    def _commit(self, save: Round) -> None:
        save.report(bytes(REPORT))
        assert len(save.reports()) == self._total
        save.end("committed")

    def _others(self, part: str, costs: defaultdict[str, float], phase: str, number: int) -> None:
        with self._measured(part, costs):
            for worker in self._workers:
                worker.send((phase, number))
            for worker in self._workers:
                requests, nbytes = worker.recv()
                costs[f"{part} requests, others"] += requests / (self._total - 1)
                costs[f"{part} bytes, others"] += nbytes / (self._total - 1)

    def _lead(self, part: str, costs: defaultdict[str, float], act: Callable[[Ranks], object]) -> None:
        store = self._ranks.store
        before = store.requests, store.bytes
        began = time.perf_counter()
        with self._measured(part, costs):
            act(self._ranks)
        costs[f"{part} seconds, rank 0"] += time.perf_counter() - began
        costs[f"{part} requests, rank 0"] += store.requests - before[0]
        costs[f"{part} bytes, rank 0"] += store.bytes - before[1]

    @contextmanager
    def _measured(self, part: str, costs: defaultdict[str, float]) -> Iterator[None]:
        began, used = time.perf_counter(), processor_time(self._processes[0].pid)
        yield
        costs[f"{part} seconds, all"] += time.perf_counter() - began
        costs[f"{part} seconds, store"] += processor_time(self._processes[0].pid) - used


def processor_time(pid: int) -> float:
    """Return the processor time of all threads of a process, in seconds."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def measure(total: int, repeat: int) -> dict[str, Any]:
    """Return the costs of a first save, the medians of later ones, and those of stock DCP's planning."""
    simulation = Simulation(total)
    first = simulation.save(0)
    later = [simulation.save(number) for number in range(1, 1 + repeat)]
    simulation.close()
    medians = {name: median(costs[name] for costs in later) for name in later[0]}
    return {"ranks": total, "first": first, "later": medians, "stock": stock(total)}


def table(results: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    columns = ["ranks", "save"]
    for part in ("training thread", "background"):
        columns += [f"{part}: rank 0", "another rank", "store", "all"]
    rows = []
    for result in results:
        for kind in ("first", "later"):
            rows.append([f"{result['ranks']:,}", kind])
            for part in ("training", "background"):
                rows[-1] += _cells(result[kind], part)
        own, about = result["stock"], ""
        if own["measured ranks"] != result["ranks"]:
            about = "about "
        lead = f"{about}{size(own['bytes, rank 0'])}, {seconds(own['seconds, rank 0'])}"
        rows.append([f"{result['ranks']:,}", "stock DCP", lead, size(own["bytes, others"]), *[""] * 6])
    return markdown(columns, rows)


def _cells(costs: dict[str, float], part: str) -> list[str]:
    requests, nbytes, took = (costs[f"{part} {what}, rank 0"] for what in ("requests", "bytes", "seconds"))
    return [
        f"{requests:,.0f} requests, {size(nbytes)}, {seconds(took)}",
        f"{costs[f'{part} requests, others']:.1f} requests, {size(costs[f'{part} bytes, others'])}",
        seconds(costs[f"{part} seconds, store"]),
        seconds(costs[f"{part} seconds, all"]),
    ]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 64, 1024, 16384])
    parser.add_argument("--repeat", type=int, default=3, help="later saves")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    data: dict[str, Any] = {"machine": machine.describe(Path.cwd()), "versions": {"torch": torch.__version__}}
    data["results"] = [measure(total, args.repeat) for total in args.ranks]
    data["machine"]["load_after"] = machine.load()
    print(*table(data["results"]), sep="\n")
    write_json(args.json, data)


if __name__ == "__main__":
    main()
