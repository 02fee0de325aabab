"""What a Checkpointer is given: steps, metrics and options, and what is said of those that make no sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import asyncckpt
from asyncckpt import Checkpointer, LastN

if TYPE_CHECKING:
    from pathlib import Path


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((5,), float(value)), "n": [value]}


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("step", [state_of(1), 1.0, "1", None, True, torch.ones(2), np.float32(1)])
def test_a_step_that_is_no_int_is_a_type_error(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path) as ckpt, pytest.raises(TypeError, match="step must be an int"):
        ckpt.save(step, state_of(1))
    assert names(tmp_path) == []


def test_swapped_arguments_are_told(tmp_path: Path) -> None:
    with (
        Checkpointer(tmp_path) as ckpt,
        pytest.raises(TypeError, match=r"not dict; the arguments are save\(step, s"),
    ):
        ckpt.save(state_of(1), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not dict; the arguments are save\(state, path\)"):
        asyncckpt.save("model.pt", state_of(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [np.int64(3), torch.tensor(3)])
def test_an_integer_of_numpy_or_torch_is_a_step(tmp_path: Path, step: Any) -> None:
    with Checkpointer(tmp_path) as ckpt:
        checkpoint = ckpt.save(
            step, state_of(1), metrics={"loss": torch.tensor(0.5).item()}
        ).committed.result(60)
    assert (checkpoint.step, type(checkpoint.step), checkpoint.metrics) == (3, int, {"loss": 0.5})


@pytest.mark.parametrize(
    "metrics", [{"loss": "low"}, {"loss": None}, {"loss": torch.ones(2)}, {"loss": 1j}, 0.5, [("loss", 0.5)]]
)
def test_metrics_that_are_no_numbers_by_name_are_a_type_error(tmp_path: Path, metrics: Any) -> None:
    with Checkpointer(tmp_path) as ckpt:
        with pytest.raises(TypeError, match="metric"):
            ckpt.save(1, state_of(1), metrics=metrics)
        ckpt.save(2, state_of(2))
    assert names(tmp_path) == ["step-00000002.pt"]


def test_metrics_that_are_too_many_to_be_listed_are_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt, pytest.raises(ValueError, match="metrics take more than"):
        ckpt.save(1, state_of(1), metrics={f"metric {i}": 0.0 for i in range(5000)})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_in_flight": 0}, ValueError, "max_in_flight must be at least 1"),
        ({"max_in_flight": True}, TypeError, "max_in_flight must be an int"),
        ({"max_in_flight": 1.5}, TypeError, "max_in_flight must be an int"),
        ({"when_busy": "drop"}, ValueError, 'must be "wait", "skip" or "replace"'),
        ({"when_busy": "replace"}, ValueError, "needs max_in_flight=2 or more"),
        ({"on_error": "log"}, TypeError, 'must be "raise" or a callable'),
        ({"keep": 3}, TypeError, "keep must be a policy"),
        ({"keep": LastN}, TypeError, "keep must be a policy"),
        ({"storage_options": {"key": "x"}}, ValueError, "takes no storage_options"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Checkpointer(tmp_path, **options)
