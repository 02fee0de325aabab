"""The benchmark of uploads runs, and tells all it is meant to tell."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("moto")

PROGRAM = Path(__file__).resolve().parents[1] / "benchmarks" / "upload.py"


@pytest.mark.slow
def test_every_way_has_its_figures(tmp_path: Path) -> None:
    found = tmp_path / "upload.json"
    command = [sys.executable, str(PROGRAM), "--megabytes", "16", "--repeat", "1", "--json", str(found)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    ways = json.loads(found.read_text())["ways"]
    assert set(ways) == {"asyncckpt", "s3fs pipe", "Lightning"}
    for name, row in ways.items():
        assert row["bytes"] == 16 << 20
        assert row["seconds"] >= row["stall"] > 0, name
        assert all(math.isfinite(value) for value in row.values())
        assert f"| {name} |" in ended.stdout
