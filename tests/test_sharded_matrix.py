"""What ours saved on N ranks is loaded on M ranks by ours and by stock DCP, bit for bit, on any mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from process_groups import MODULES, on_ranks
from programs import Interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter(*MODULES) as interpreter:
        yield interpreter


@pytest.fixture(scope="module")
def saved(
    interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[Path, dict[str, str]]]:
    """Return a function that saves states of each kind on so many ranks; it returns path and digests."""
    known: dict[int, tuple[Path, dict[str, str]]] = {}

    def save(ranks: int) -> tuple[Path, dict[str, str]]:
        if ranks not in known:
            path = tmp_path_factory.mktemp(f"saved{ranks}")
            body = f"from sharded_matrix import save_all\ntold.append(save_all({str(path)!r}))"
            ((digests,), *others) = on_ranks(interpreter, tmp_path_factory.mktemp("save"), body, ranks)
            assert others == [[digests]] * (ranks - 1)
            known[ranks] = path, digests
        return known[ranks]

    return save


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        pytest.param(saving, loading, marks=[] if (saving, loading) in {(2, 3), (4, 1)} else pytest.mark.soak)
        for saving in (1, 2, 3, 4)
        for loading in (1, 2, 3, 4)
    ],
)
def test_states_are_loaded_on_other_ranks_by_ours_and_by_stock(
    interpreter: Interpreter,
    saved: Callable[[int], tuple[Path, dict[str, str]]],
    tmp_path: Path,
    saving: int,
    loading: int,
) -> None:
    path, digests = saved(saving)
    assert len(set(digests.values())) == 2  # one of each optimizer
    body = f"from sharded_matrix import load_all\ntold.append(load_all({str(path)!r}, {digests!r}))"
    assert on_ranks(interpreter, tmp_path, body, loading) == [[[]]] * loading
