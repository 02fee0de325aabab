"""The shell itself: help, versions, errors, options, and how it ends."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

import asyncckpt
from asyncckpt import __version__
from asyncckpt.cli import output
from asyncckpt.cli.app import app
from support import run_python

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def commands() -> list[str]:
    return [command.callback.__name__ for command in app.registered_commands if command.callback]


def test_help_names_the_commands() -> None:
    long, short, bare = run("--help"), run("-h"), run()
    assert long.exit_code == short.exit_code == 0
    assert long.stdout == short.stdout
    assert set(commands()) >= {"ls", "verify", "prune"}
    for command in commands():
        assert f"\n  {command} " in long.stdout
    assert "Commands:" in bare.output


@pytest.mark.parametrize("command", commands())
def test_each_command_has_an_example(command: str) -> None:
    shown = run(command, "-h")
    assert shown.exit_code == 0
    assert f"Example: asyncckpt {command} " in shown.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "."]])
def test_help_and_listings_do_without_torch_and_those_of_our_files_without_numpy(
    arguments: list[str], tmp_path: Path
) -> None:
    with asyncckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(3)}, metrics={"val_loss": 0.5})
    script = """
        import os, sys
        from asyncckpt.cli.app import app

        os.chdir(sys.argv[1])
        app(sys.argv[2:], standalone_mode=False)
        print({"torch", "numpy"} & sys.modules.keys(), file=sys.stderr)
    """
    status, printed, errors = run_python(script, str(tmp_path), *arguments)
    assert (status, errors) == (0, "set()\n")
    assert "Usage:" in printed or "step-00000001.pt" in printed
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(3)}}, tmp_path / "other.ckpt")
    status, printed, errors = run_python(script.replace(', "numpy"', ""), str(tmp_path), *arguments)
    assert (status, errors) == (0, "set()\n")
    assert "Usage:" in printed or {"step-00000001.pt", "other.ckpt"} < set(printed.split())


def test_the_version_is_shown() -> None:
    assert run("--version").stdout == f"asyncckpt {__version__}\n"


def test_an_unknown_command_is_an_error() -> None:
    assert run("list", ".").exit_code == 2


def test_what_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    result = run("ls", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"asyncckpt: there is no directory {tmp_path / 'none'}\n"


def test_errors_of_the_system_are_told_without_a_traceback(tmp_path: Path) -> None:
    result = run("ls", "unheard-of://bucket/run")
    assert result.exit_code == 2
    assert result.stderr.startswith("asyncckpt: while opening it: Protocol not known")
    assert result.stderr.count("\n") == 1
    (tmp_path / "file").touch()
    assert run("ls", str(tmp_path / "file" / "below")).exit_code == 2


class _RememberingFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    protocol = "remembering"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own is one for all, too
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__()
        type(self).options = options


def test_options_reach_the_file_system() -> None:
    fsspec.register_implementation("remembering", _RememberingFileSystem, clobber=True)
    options = ["--option", "level=3", "--option", "name=a=b", "--option", 'more={"x": true}']
    run("ls", "remembering://run", *options)
    assert _RememberingFileSystem.options == {"level": 3, "name": "a=b", "more": {"x": True}}


@pytest.mark.parametrize("option", ["level", "=3", ""])
def test_an_option_that_is_no_pair_is_refused(option: str) -> None:
    result = run("ls", "memory://run", "--option", option)
    assert result.exit_code == 2
    assert f"{option!r} is not KEY=VALUE" in result.stderr


def test_a_local_path_takes_no_options(tmp_path: Path) -> None:
    result = run("verify", str(tmp_path), "--option", "key=1")
    assert result.exit_code == 2
    assert "--option" in result.stderr
    assert "local path" in result.stderr


def test_numbers_are_written_for_people() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.50 kB", 999_499: "999 kB", 999_600: "1.00 MB"}
    sizes |= {14_900_000: "14.9 MB", 1_488_000_000: "1.49 GB", 2_500 * 10**12: "2.50 PB"}
    assert {nbytes: output.size(nbytes) for nbytes in sizes} == sizes
    numbers = {
        2.3456789: "2.3457",
        3.0: "3",
        1e300: "1e+300",
        -0.5: "-0.5",
        math.inf: "inf",
        0.00001: "1e-05",
    }
    assert {value: output.number(value) for value in numbers} == numbers
    assert output.number(math.nan) == "nan"
    ages = {-5: "0 s", 0: "0 s", 119: "119 s", 120: "2 min", 7_199: "120 min", 7_200: "2 h", 200_000: "2 d"}
    assert {seconds: output.age(seconds) for seconds in ages} == ages


def test_json_has_no_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"values": [math.nan, math.inf, -math.inf, 1.5], "name": "[bold]ü" + "x" * 300})
    printed = capsys.readouterr().out
    values = ["NaN", "Infinity", "-Infinity", 1.5]
    assert json.loads(printed, parse_constant=pytest.fail) == {
        "values": values,
        "name": "[bold]ü" + "x" * 300,
    }


def test_a_closed_pipe_ends_it_quietly(tmp_path: Path) -> None:
    for number in range(3):
        torch.save({}, tmp_path / f"{number}.pt")
    command = [sys.executable, "-W", "error", "-m", "asyncckpt", "ls", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_without_its_packages_it_says_what_to_install() -> None:
    script = """
        import sys
        from asyncckpt.cli import main

        for name in ("typer", "rich"):
            sys.modules[name] = None
            try:
                main()
            except SystemExit as end:
                print(name, end.code)
            del sys.modules[name]
    """
    status, printed, errors = run_python(script)
    line = "asyncckpt: the shell needs typer and rich: pip install typer rich\n"
    assert (status, printed, errors) == (0, "typer 2\nrich 2\n", 2 * line)


def test_ctrl_c_ends_it_in_the_middle_of_a_read(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pt")
    script = """
        import os, signal, sys, threading
        from asyncckpt.cli import locations, main
        from asyncckpt.stores import open_store
        from asyncckpt.testing import Gate, SlowStore

        gate = Gate()
        locations.open_store = lambda *given: SlowStore(open_store(*given), gates={"read": gate})

        def interrupt():
            gate.wait_for_arrival()
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        sys.argv[1:] = ["verify", sys.argv[1]]
        main()
    """
    assert run_python(script, str(tmp_path)) == (130, "", "")
