"""The command line: list, inspect, verify, compare, adopt and prune checkpoints."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        from asyncckpt.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"rich", "typer"}:
            raise
        sys.stderr.write("asyncckpt: the shell needs typer and rich: pip install typer rich\n")
        sys.exit(2)
    app(prog_name="asyncckpt")
