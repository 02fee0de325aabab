"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe(directory: Path) -> dict[str, str | int | float]:
    """Return what is known of the machine and of the file system that holds `directory`."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "huge_pages": huge.read_text(encoding="ascii").strip() if huge.exists() else "none",
        "file_system": file_system(directory),
        "load_before": load(),
    }


def load() -> float:
    """Return the load average of the last minute: what else the machine was doing."""
    return round(os.getloadavg()[0], 2)


def file_system(directory: Path) -> str:
    """Return the type, the source and the options of the mount that holds `directory`."""
    best, found = "", "unknown"
    path = str(directory.resolve()) + "/"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].replace("\\040", " ")
        if path.startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            kind, source, options = after.split(maxsplit=2)
            best, found = mount, f"{kind} on {source} ({options})"
    return found


def _first(path: str, key: str) -> str | None:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
