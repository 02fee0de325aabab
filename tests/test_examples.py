"""What users are told to run runs: the example for Lightning, and the one in the README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def run(directory: Path, *arguments: str) -> str:
    """Run Python to its end, and return what it says."""
    command = [sys.executable, "-W", "ignore", *arguments]
    ended = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


def test_the_digits_example_goes_on_where_it_was(tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "lightning_digits.py")
    first = run(tmp_path, example, "--epochs", "2")
    assert "Restored all states" not in first
    again = run(tmp_path, example, "--epochs", "3")
    assert "Restored all states from the checkpoint at" in again
    last = tmp_path / "runs" / "digits" / "last.ckpt"
    assert last.is_symlink()
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert (tmp_path / "runs" / "digits" / "best.ckpt").exists()


def test_the_lightning_example_of_the_readme_can_be_pasted(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (program,) = [block for block in blocks if "class Digits" in block]
    assert "max_epochs=10" in program
    run(tmp_path, "-c", program.replace("max_epochs=10", "max_epochs=2, enable_progress_bar=False"))
    assert torch.load(tmp_path / "runs" / "digits" / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_of_the_documentation_shows_runs(tmp_path: Path, page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    printed = run(tmp_path, "-c", "\n".join(blocks))
    expected = re.findall(r"^print\(.*\) +# (.*)$", "\n".join(blocks), re.MULTILINE)
    assert printed.splitlines() == expected
