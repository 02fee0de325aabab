"""Run the tests that need a GPU, with nothing but pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
MARK = "mark.gpu"


def run_tests(limit: float) -> dict[str, Any]:
    """Run the tests marked `gpu`; returns a summary and the failures, or the error.

    Only their files are imported, and none of the project's settings is read: those of other tests need
    packages and plugins that a bare machine has not.

    Args:
        limit: seconds after which they are stopped.
    """
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if MARK in path.read_text("utf-8")]
    if not files:
        return _failed(f"no file of tests has a {MARK}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-c", os.devnull]
        command += ["--rootdir", str(ROOT), "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            subprocess.run([*command, *map(str, files)], stdout=sys.stderr, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return _failed(f"took longer than {limit:.0f} s and were stopped")
        if not report.exists():
            return _failed("pytest has not run them; its output says why")
        return _summary(ET.parse(report).iter("testcase"))


def _failed(error: str) -> dict[str, Any]:
    return {"error": error, "summary": error, "failures": []}


def _summary(cases: Any) -> dict[str, Any]:
    counts = {"passed": 0, "skipped": 0, "failed": 0}
    failures: list[str] = []
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            lines: Sequence[str] = bad.get("message", "").splitlines()
            failures.append(f"{case.get('classname')}::{case.get('name')}: {lines[0] if lines else ''}")
        counts[
            "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        ] += 1
    return {**counts, "summary": ", ".join(f"{n} {kind}" for kind, n in counts.items()), "failures": failures}
