"""RandomState: all generators go on where they were, or none is touched."""

from __future__ import annotations

import copy
import random
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from asyncckpt import Checkpointer, RandomState, StateMismatchError
from asyncckpt._snapshot.freeze import Freezer
from asyncckpt._stateful import is_stateful
from support import run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    """Leave the generators as they were."""
    state = RandomState().state_dict()
    yield
    RandomState().load_state_dict(state)


def draw() -> list[Any]:
    """Draw from all generators, an odd number of normal ones, of which they keep the second."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(5).tolist(),  # noqa: NPY002 - the global generator
        np.random.standard_normal(3).tolist(),  # noqa: NPY002
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
        *(torch.rand(5, device=f"cuda:{i}").tolist() for i in range(torch.cuda.device_count())),
    ]


def test_all_generators_continue_from_the_saved_state(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "rng": RandomState()}
    with Checkpointer(tmp_path) as ckpt:
        draw()
        ckpt.save(1, state)
        expected = [draw(), draw()]
        ckpt.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ckpt.restore(state)
        assert [draw(), draw()] == expected


def test_another_process_continues_from_the_saved_state(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"rng": RandomState()})
        expected = [random.random(), float(np.random.standard_normal()), torch.rand(1).item()]  # noqa: NPY002
    script = """
        import random, sys
        import numpy as np, torch
        from asyncckpt import Checkpointer, RandomState
        with Checkpointer(sys.argv[1]) as ckpt:
            ckpt.restore({"rng": RandomState()})
        print([random.random(), float(np.random.standard_normal()), torch.rand(1).item()])
    """
    assert run_python(script, str(tmp_path)) == (0, f"{expected}\n", "")


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_other_bit_generators_of_numpy_continue_from_the_saved_state(
    tmp_path: Path, kind: Callable[[], Any]
) -> None:
    numpy_random: Any = np.random
    before = numpy_random.get_bit_generator()
    try:
        numpy_random.set_bit_generator(kind())
        draw()
        with Checkpointer(tmp_path) as ckpt:
            ckpt.save(1, {"rng": RandomState()})
            expected = draw()
            ckpt.restore({"rng": RandomState()})
            assert draw() == expected
            numpy_random.set_bit_generator(before)
            with pytest.raises(
                StateMismatchError, match=r"MT19937; set that one with numpy\.random\.set_bit"
            ):
                ckpt.restore({"rng": RandomState()})
    finally:
        numpy_random.set_bit_generator(before)


def test_random_state_is_stateful() -> None:
    assert is_stateful(RandomState())


def test_its_tensors_are_plain_ones_which_freeze_fast() -> None:
    freezer = Freezer()
    freezer.freeze(RandomState().state_dict())
    assert not freezer._exact


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s["python"].update(version=9), "python: ValueError"),
        (lambda s: s["python"].update(words=s["python"]["words"][:100]), "python: ValueError"),
        (lambda s: s["python"].update(gauss="1"), "python: TypeError: gauss is a str"),
        (lambda s: s["python"].pop("gauss"), "python: KeyError"),
        (lambda s: s["numpy"].update(bit_generator="PCG64"), "numpy: ValueError: it is of a PCG64"),
        (lambda s: s["numpy"]["state"].update(key=torch.ones(623, dtype=torch.int32)), "numpy: IndexError"),
        (
            lambda s: s["numpy"]["state"].update(key=torch.ones(625, dtype=torch.int32)),
            "numpy: ValueError: it is no",
        ),
        (lambda s: s["numpy"]["state"].update(pos=625), "numpy: ValueError: (it is no|state pos)"),
        (lambda s: s.update(torch=torch.ones(5, dtype=torch.uint8)), "torch: RuntimeError"),
        (lambda s: s.update(torch=None), "torch: AttributeError"),
        (lambda s: s.update(cuda=5), "cuda: TypeError"),
    ],
)
def test_a_state_that_does_not_fit_changes_no_generator(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    rng, state = RandomState(), copy.deepcopy(RandomState().state_dict())
    draw()
    before = rng.state_dict()
    change(state)
    with pytest.raises(StateMismatchError, match=rf"none was changed:\n  {problem}"):
        rng.load_state_dict(state)
    expected = draw()
    rng.load_state_dict(before)
    assert draw() == expected


def test_each_state_that_does_not_fit_is_listed() -> None:
    state = RandomState().state_dict() | {"torch": 1, "python": 2}
    with pytest.raises(StateMismatchError, match=r"\n  python: TypeError: .*\n  torch: AttributeError: "):
        RandomState().load_state_dict(state)


@pytest.mark.parametrize("state", [None, {}, {"torch": 1}, RandomState().state_dict() | {"npu": []}])
def test_other_state_dicts_are_refused(state: Any) -> None:
    with pytest.raises(
        StateMismatchError, match=r"^a RandomState has the entries \['python', 'numpy', 'torch'"
    ):
        RandomState().load_state_dict(state)


class FakeXpu:
    """Devices with generators of the CPU."""

    def __init__(self, count: int) -> None:
        self.generators = [torch.Generator().manual_seed(index) for index in range(count)]

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state(self, index: int) -> torch.Tensor:
        return self.generators[index].get_state()

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.generators[index].set_state(state)

    def draw(self) -> list[int]:
        return [int(torch.randint(1 << 40, (1,), generator=generator)) for generator in self.generators]


@pytest.mark.parametrize(
    ("here", "warning"),
    [
        (2, None),
        (1, "random states of devices that this machine lacks were not restored: xpu:1$"),
        (3, "the checkpoint has no random states of these devices, which keep theirs: xpu:2$"),
    ],
)
def test_existing_devices_are_restored_and_others_warned_of(
    monkeypatch: pytest.MonkeyPatch, here: int, warning: str | None
) -> None:
    there = FakeXpu(2)
    monkeypatch.setattr(torch, "xpu", there)
    there.draw()
    state = RandomState().state_dict()
    expected = there.draw()
    devices = FakeXpu(here)
    kept = FakeXpu(here).draw()
    monkeypatch.setattr(torch, "xpu", devices)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RandomState().load_state_dict(state)
    assert devices.draw() == (expected + kept[2:])[:here]
    assert [w.filename for w in caught] == [__file__] * (warning is not None)
    if warning:
        with pytest.warns(UserWarning, match=warning):
            RandomState().load_state_dict(state)


def test_a_state_of_a_device_that_does_not_fit_changes_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "xpu", FakeXpu(1))
    state = RandomState().state_dict()
    expected = draw()
    with pytest.raises(StateMismatchError, match="xpu: RuntimeError"):
        RandomState().load_state_dict(state | {"xpu": [torch.ones(7, dtype=torch.uint8)]})
    RandomState().load_state_dict(state)
    assert draw() == expected
