"""Loaded tensors are copied into live ones: the same values as by torch, whatever overlaps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt._loading.copies import Copy, copy_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE = 3 << 20  # more than one piece


def copied(*pairs: tuple[torch.Tensor, torch.Tensor]) -> list[str]:
    begun: list[str] = []
    copy_tensors([Copy(str(at), *pair) for at, pair in enumerate(pairs)], begun)
    return begun


def noise(size: int = LARGE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(3)).to(dtype)


def square(size: int = 512) -> torch.Tensor:
    return noise(size * size).view(size, size)


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (torch.zeros(LARGE), noise()),
        (torch.zeros(LARGE), noise(dtype=torch.bfloat16)),
        (torch.zeros(3), noise(3)),
        (torch.zeros(0), noise(0)),
        (torch.zeros(LARGE + 1)[1:], noise(LARGE + 3)[3:]),
        (torch.zeros(512, 512), square().t()),
        (torch.zeros(512, 512).t(), square()),
        (torch.zeros(512, 1024)[:, :512], square()),
        (torch.zeros(LARGE, dtype=torch.complex64), noise(dtype=torch.complex64).mul(1j).conj()),
        (torch.zeros(LARGE, dtype=torch.complex64).conj(), noise(dtype=torch.complex64).mul(1j)),
        (torch.zeros(LARGE), torch.view_as_complex(noise(2 * LARGE).view(-1, 2)).conj().imag),
        (torch.nn.Parameter(torch.zeros(LARGE)), noise()),
    ],
    ids=[
        "large", "converted", "small", "empty", "parts", "transposed source", "transposed target", "columns",
        "conjugated source", "conjugated target", "negated source", "parameter",
    ],
)  # fmt: skip
def test_a_target_gets_the_values_of_its_source(target: torch.Tensor, source: torch.Tensor) -> None:
    expected = source.clone().to(target.dtype)
    assert copied((target, source)) == ["0"]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("size", [8, LARGE])
def test_version_counters_show_the_change(size: int) -> None:
    target = torch.zeros(size)
    before = target._version
    copied((target, torch.ones(size)))
    assert target._version > before


def test_no_byte_behind_a_source_is_copied_into_a_target_that_has_grown() -> None:
    target = torch.zeros(2 * LARGE)
    with pytest.raises(RuntimeError, match="must match"):
        copied((target, noise()))
    assert not target.any()


def test_tied_tensors_are_copied_once_from_a_tied_source() -> None:
    target, source = torch.zeros(512, 512), square()
    assert copied((target, source), (target.view(-1), source.view(-1))) == ["0", "1"]
    assert torch.equal(target, square())


@pytest.mark.parametrize(
    "second",
    [
        lambda whole: whole,
        lambda whole: whole[LARGE // 2 :],
        lambda whole: whole[5:9],
        lambda whole: whole[::2],
        lambda whole: whole.view(torch.int32)[: LARGE // 3],
    ],
    ids=["all", "half", "few", "every other", "another type"],
)
def test_where_targets_overlap_the_last_copy_counts(second: Callable[[torch.Tensor], torch.Tensor]) -> None:
    target, expected, first = torch.zeros(LARGE), torch.zeros(LARGE), noise()
    last = torch.full_like(second(target), 7)
    expected.copy_(first)
    second(expected).copy_(last)
    assert copied((target, first), (second(target), last)) == ["0", "1"]
    assert torch.equal(target, expected)
    expected.copy_(first)
    assert copied((second(target), last), (target, first)) == ["0", "1"]
    assert torch.equal(target, expected)


SPANS = st.tuples(st.integers(0, 60_000), st.integers(1, 60_000), st.integers(0, 3), st.booleans())


@given(spans=st.lists(SPANS, max_size=6))
def test_any_parts_of_one_memory_are_copied_as_in_order(spans: list[tuple[int, int, int, bool]]) -> None:
    live, expected, saved = torch.zeros(60_000), torch.zeros(60_000), noise(120_000)

    def part(of: torch.Tensor, start: int, length: int, step: int) -> torch.Tensor:
        return of[start : start + length : step + 1]

    pairs = []
    for start, length, step, shifted in spans:
        target = part(live, start, length, step)
        source = saved[start + shifted :][: len(target)]
        pairs.append((target, source))
        part(expected, start, length, step).copy_(source)
    copied(*pairs)
    assert torch.equal(live, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_a_target_on_a_gpu_gets_the_values_after_the_kernels_before(pinned: bool) -> None:  # noqa: FBT001 - parametrized
    source = noise().pin_memory() if pinned else noise()
    target, other = torch.zeros(LARGE, device="cuda"), torch.zeros(512, 512, device="cuda").t()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        target.fill_(7)  # is still to run when the copy is queued
        copied((target, source), (other, square()))
        source.zero_()  # the copies have ended
    assert torch.equal(target.cpu(), noise())
    assert torch.equal(other.cpu(), square())
