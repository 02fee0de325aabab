"""The command line application. Neither it nor the modules of its commands import torch at the top."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asyncckpt._version import __version__
from asyncckpt.cli.adopting import adopt
from asyncckpt.cli.benching import bench
from asyncckpt.cli.differing import diff
from asyncckpt.cli.inspecting import inspect
from asyncckpt.cli.listing import ls
from asyncckpt.cli.output import complain, line
from asyncckpt.cli.pruning import prune
from asyncckpt.cli.verifying import verify
from asyncckpt.errors import AsyncCkptError

if TYPE_CHECKING:
    from collections.abc import Callable

_FAILED = 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        line(f"asyncckpt {__version__}")
        raise typer.Exit


@app.callback()
def about(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """List, inspect, verify, compare, adopt and prune checkpoints."""
    del version


def _with_errors_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (AsyncCkptError, OSError) as error:
            complain(error)
            raise typer.Exit(_FAILED) from None

    return run


for _command in (ls, inspect, verify, diff, prune, adopt, bench):
    app.command()(_with_errors_in_one_line(_command))
