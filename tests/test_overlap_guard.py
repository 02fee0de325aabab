"""A snapshot that something else than a step has changed fails, names the tensor, and is not committed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from asyncckpt import SaveError, TornSnapshotError
from asyncckpt._snapshot.guard import fingerprint
from asyncckpt.testing import Gate
from overlaps import Held
from support import gated_store
from trainings import train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from copier import Copier

FIRST_WEIGHT = r'state\["model"\]\["0.weight"\]'


def add(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(1)


def add_to_a_view(parameter: nn.Parameter) -> None:
    parameter.detach()[3:5, 7].add_(1)


def load(parameter: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = parameter
    module.load_state_dict({"weight": torch.zeros_like(parameter)})


def fill_by_foreach(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        torch._foreach_add_([parameter], 1.0)


def write_out(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        torch.add(parameter, 1, out=parameter)


SEEN = [add, add_to_a_view, load, fill_by_foreach, write_out, nn.init.zeros_]


def change_data(parameter: nn.Parameter) -> None:
    parameter.data.add_(1)


def change_by_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[-1, -1] += 1


def change_by_dlpack(parameter: nn.Parameter) -> None:
    torch.utils.dlpack.from_dlpack(parameter.detach())[0, 0] += 1


def change_storage(parameter: nn.Parameter) -> None:
    parameter.untyped_storage()[3] ^= 0x40


def step_by_hand(parameter: nn.Parameter) -> None:
    one, step = torch.ones_like(parameter), torch.ones(())
    torch._fused_adamw_(
        [parameter.detach()],
        [one],
        [one.clone()],
        [one.clone()],
        [],
        [step],
        amsgrad=False,
        lr=0.1,
        beta1=0.9,
        beta2=0.99,
        weight_decay=0.0,
        eps=1e-8,
        maximize=False,
    )


UNSEEN = [change_data, change_by_numpy, change_by_dlpack, change_storage, step_by_hand]
Change = Any


def assert_torn(held: Held, save: Any, path: str = FIRST_WEIGHT) -> None:
    """Assert that a save fails, that nothing is left of it, and that the next one succeeds."""
    with pytest.raises(TornSnapshotError, match=path) as raised:
        save.committed.result(30)
    assert isinstance(raised.value, SaveError)
    assert "call fence() before other changes, or save with overlap=False" in str(raised.value)
    assert [checkpoint.step for checkpoint in held.ckpt.checkpoints()] == [0]
    held.ckpt.verify(0)
    after = held.save(2)
    held.training.step()
    held.assert_saved(after)


@pytest.mark.parametrize("guard", ["version", "checksum"])
@pytest.mark.parametrize("change", SEEN)
def test_a_change_before_the_copy_is_over(
    tmp_path: Path, copier: Copier, change: Callable[[Change], object], guard: str
) -> None:
    with Held(copier, tmp_path, guard=guard) as held:
        held.ckpt.save(0, {}, overlap=False)
        save = held.save()
        change(held.model[0].weight)
        copier.open()
        assert_torn(held, save, f"{FIRST_WEIGHT} was changed in place before its copy was finished")


def test_a_change_before_the_step(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        held.ckpt.save(0, {}, overlap=False)
        held.backward()
        save = held.save()
        add(held.model[0].weight)
        held.opt.step()
        assert save.snapshotted.done()
        assert_torn(held, save)


def test_a_change_of_the_state_of_an_optimizer(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        held.ckpt.save(0, {}, overlap=False)
        save = held.save()
        held.opt.state[held.model[0].weight]["momentum_buffer"].zero_()
        held.ckpt.fence()
        assert_torn(held, save, r'state\["opt"\]\["state"\]\[0\]\["momentum_buffer"\] was changed')


@pytest.mark.parametrize("fenced", [False, True])
def test_a_change_after_the_copy_and_before_the_commit(
    tmp_path: Path, copier: Copier, *, fenced: bool
) -> None:
    gate = Gate(opened=True)
    with Held(copier, gate=gate, store=gated_store(tmp_path, gate, "write")) as held:
        held.ckpt.save(0, {}, overlap=False).committed.result(30)
        gate.close()
        save = held.save()
        copier.open()
        for job in held.ckpt._saver._jobs_in_flight():
            assert job.snapshot is not None
            job.snapshot.filled.wait_for_end()
        if fenced:
            held.ckpt.fence()
        add(held.model[0].weight)
        gate.open()
        if fenced:
            held.assert_saved(save)
        else:
            assert_torn(held, save)


@pytest.mark.parametrize("change", UNSEEN)
def test_a_checksum_sees_changes_that_versions_do_not(
    tmp_path: Path, copier: Copier, change: Callable[[Change], object]
) -> None:
    with Held(copier, tmp_path, guard="checksum") as held:
        held.ckpt.save(0, {}, overlap=False)
        save = held.save()
        change(held.model[0].weight)
        copier.open()
        assert_torn(held, save, f"{FIRST_WEIGHT} has other bytes than when it was frozen")


@pytest.mark.parametrize("change", UNSEEN)
def test_versions_do_not_see_them(tmp_path: Path, copier: Copier, change: Callable[[Change], object]) -> None:
    """If this fails, the documentation of the guard promises too little."""
    with Held(copier, tmp_path) as held:
        save = held.save()
        change(held.model[0].weight)
        copier.open()
        save.committed.result(30)


def test_a_checksum_allows_steps(tmp_path: Path, copier: Copier) -> None:
    make = partial(train, make_optimizer=partial(torch.optim.AdamW, fused=True))
    with Held(copier, tmp_path, make, guard="checksum") as held:
        for step in range(3):
            save = held.save(step)
            held.training.step()
            held.assert_saved(save)


def test_a_torn_snapshot_in_containers_that_changed_meanwhile(tmp_path: Path, copier: Copier) -> None:
    with Held(copier, tmp_path) as held:
        state = {"a": {"b": [held.model[0].weight.detach()]}}
        save = held.save(1, state)
        state["a"]["b"].clear()
        add(held.model[0].weight)
        copier.open()
        with pytest.raises(TornSnapshotError, match=r"state.* was changed in place"):
            save.committed.result(30)


class TestFingerprint:
    @given(data=st.binary(min_size=1, max_size=200), start=st.integers(0, 16), place=st.data())
    def test_of_bytes_with_another_bit(self, data: bytes, start: int, place: st.DataObject) -> None:
        memory = torch.frombuffer(bytearray(start) + bytearray(data), dtype=torch.uint8)[start:]
        before = int(fingerprint(memory))
        memory[place.draw(st.integers(0, len(data) - 1))] ^= 1 << place.draw(st.integers(0, 7))
        assert int(fingerprint(memory)) != before

    @given(
        bit=st.integers(0, 63),
        places=st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True),
    )
    def test_of_bytes_with_other_bits(self, bit: int, places: list[int]) -> None:
        """The same change of several words does not cancel out."""
        memory = torch.zeros(1000, dtype=torch.int64)
        before = int(fingerprint(memory.view(torch.uint8)))
        memory[places] = 1 << bit if bit < 63 else -(1 << 63)
        assert int(fingerprint(memory.view(torch.uint8))) != before

    @given(data=st.binary(max_size=200), one=st.integers(0, 16), other=st.integers(0, 16))
    def test_of_equal_bytes(self, data: bytes, one: int, other: int) -> None:
        memory = [torch.tensor([*bytes(start), *data], dtype=torch.uint8)[start:] for start in (one, other)]
        assert int(fingerprint(memory[0])) == int(fingerprint(memory[1]))

    def test_of_more_than_one_piece(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = torch.arange(800, dtype=torch.int64).view(torch.uint8)
        whole = int(fingerprint(memory))
        monkeypatch.setattr("asyncckpt._snapshot.guard._WORDS", 7)
        assert int(fingerprint(memory)) == whole

    def test_of_words_that_changed_places(self) -> None:
        memory = torch.arange(8, dtype=torch.int64)
        assert int(fingerprint(memory.view(torch.uint8))) != int(
            fingerprint(memory.flip(0).view(torch.uint8))
        )
