"""Ctrl-C on one rank while all save: all ranks have the checkpoint or none has, and none waits in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from process_groups import MODULES, on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter(*MODULES) as interpreter:
        yield interpreter


@pytest.fixture(
    params=[pytest.param(1, id="every point", marks=pytest.mark.soak), pytest.param(29, id="some")]
)
def stride(request: pytest.FixtureRequest) -> int:
    """How far apart the points are, of which there are many here."""
    number: int = request.param
    return number


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("plans", "points"), [(False, 300), (True, 600)])
def test_an_interrupted_save_leaves_the_ranks_in_step(  # noqa: PLR0913 - fixtures
    interpreter: Interpreter, tmp_path: Path, victim: int, points: int, stride: int, *, plans: bool
) -> None:
    body = f"""
import gc
from sharded_interrupts import Interrupted
gc.freeze()
told.append(Interrupted(directory, {victim}, plans={plans}).everywhere({stride}))
"""
    one, other = on_ranks(interpreter, tmp_path, body, store="tcp")
    assert one == other
    assert one[0] > points
