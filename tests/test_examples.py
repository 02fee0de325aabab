"""What users are told to run runs: the example programs, and what README.md and the pages of docs show."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import asyncckpt
import asyncckpt.lightning
import asyncckpt.pytorch_lightning
import asyncckpt.stores
import asyncckpt.testing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from object_servers import MotoServer

ROOT = Path(__file__).resolve().parents[1]
# One process for all commands: most of the time of one is the start of Python.
COMMANDS = """
import shlex, sys
from asyncckpt.cli import main

for command in sys.argv[1:]:
    sys.argv = ["asyncckpt", *shlex.split(command)]
    try:
        main()
    except SystemExit as exit:
        print(f"{command}: {exit.code or 0}", file=sys.stderr, flush=True)
    print("exit status ", flush=True)
"""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def program_of(page: Path) -> str:
    """Return all Python blocks of a page, one after another."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def run(
    directory: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_digits_example_resumes(tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "lightning_digits.py")
    for epochs, restores in (("2", False), ("3", True)):
        ended = run(tmp_path, example, "--epochs", epochs)
        assert ended.returncode == 0, ended.stderr
        assert ("Restored all states from the checkpoint at" in ended.stdout + ended.stderr) is restores
    last = tmp_path / "runs" / "digits" / "last.ckpt"
    assert last.is_symlink()
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert (tmp_path / "runs" / "digits" / "best.ckpt").exists()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if program_of(page) and page.stem != "shell"], ids=lambda page: page.stem
)
def test_the_python_examples_of_a_page_print_what_it_shows(
    tmp_path: Path, page: Path, request: pytest.FixtureRequest
) -> None:
    program = program_of(page)
    environment = {}
    if "s3://" in program:
        moto: MotoServer = request.getfixturevalue("moto")
        environment = {
            "AWS_ENDPOINT_URL": moto.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
        }
    arguments = ["-c", program]
    if "init_process_group" in program:
        (tmp_path / "train.py").write_text(program)
        arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    ended = run(tmp_path, *arguments, environment=environment)
    assert ended.returncode == 0, ended.stderr
    expected = re.findall(r"^ *print\(.*\) +# (.*)$", program, re.MULTILINE)
    # Lightning prints its progress between the lines, and messages of its own.
    is_quiet = "lightning" not in program
    assert [line for line in ended.stdout.splitlines() if is_quiet or line in expected] == expected
    assert not (is_quiet and ended.stderr), ended.stderr


def test_the_commands_of_the_shell_page_print_what_it_shows(tmp_path: Path) -> None:
    page = ROOT / "docs" / "shell.md"
    parts = re.findall(r"^\$ asyncckpt ([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    shown = {command: lines for command, lines in parts if lines}
    assert len(shown) == 8
    ended = run(tmp_path, "-c", program_of(page) + COMMANDS, *shown)
    assert ended.returncode == 0, ended.stderr
    outputs = ended.stdout.split("exit status ")
    for (command, lines), printed in zip(shown.items(), outputs, strict=False):
        expected = [without_numbers(line) for line in lines.splitlines() if line != "…"]
        there = set(map(without_numbers, printed.splitlines()))
        assert [line for line in expected if line not in there] == []
        assert f"{command}: {1 if command.startswith('diff') else 0}\n" in ended.stderr


def without_numbers(line: str) -> str:
    """Return a line of a table in one spelling of blanks and of what changes from run to run."""
    return re.sub(r"[\d.,]+", "#", " ".join(line.split()))


@pytest.mark.parametrize(
    "module",
    [asyncckpt, asyncckpt.lightning, asyncckpt.pytorch_lightning, asyncckpt.stores, asyncckpt.testing],
    ids=lambda module: module.__name__,
)
def test_the_api_page_lists_every_public_name(module: ModuleType) -> None:
    named = set(re.findall(r"`([\w.]+)`", (ROOT / "docs" / "api.md").read_text()))
    assert set(module.__all__) - named == set()


def test_the_api_page_says_what_each_error_is() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|([^|]*)\| [^|]* \|$", page, re.MULTILINE))
    errors = {name for name in asyncckpt.__all__ if _is_error(getattr(asyncckpt, name))}
    assert set(rows) == errors - {"AsyncCkptError"}
    for name, bases in rows.items():
        for base in re.findall(r"`(?:pickle\.)?(\w+)`", bases):
            assert base in [cls.__name__ for cls in getattr(asyncckpt, name).__mro__[1:]]


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
