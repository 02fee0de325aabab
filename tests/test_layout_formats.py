"""A second format goes through the same copy, transfer and store as torch's, as ranges of any kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from asyncckpt._saving.engine import get_engine
from asyncckpt._saving.staging import Snapshot
from asyncckpt._saving.transfer import Transfer
from asyncckpt._snapshot.ranges import ranges_of
from asyncckpt.layout.plan import Body, FilePlan, Format
from asyncckpt.stores.local import LocalStore
from asyncckpt.types import SaveStats
from support import run_python

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class DenseBody(Body):
    header: bytes


class Dense(Format[Tensors, DenseBody]):
    """As safetensors has it: the length of a header, the header, and all data without a gap."""

    def lay_out(self, frozen: Tensors) -> DenseBody:
        ends = np.cumsum([0, *(tensor.nbytes for tensor in frozen.values())], dtype=np.int64)
        fields = {
            name: {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, stop]}
            for (name, tensor), start, stop in zip(
                frozen.items(), ends[:-1].tolist(), ends[1:].tolist(), strict=True
            )
        }
        header = json.dumps(fields).encode()
        header += b" " * (-len(header) % 8)
        ends += 8 + len(header)
        return DenseBody(ends[:-1], ends[1:], int(ends[-1]), len(header).to_bytes(8, "little") + header)

    def plan(self, frozen: Tensors, body: DenseBody, description: bytes) -> FilePlan:
        del frozen, description
        return FilePlan(body, ((0, body.header),), b"", NONE, NONE)


def read_dense(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    return {
        name: np.frombuffer(
            data[begin:][slice(*entry["data_offsets"])], entry["dtype"].removeprefix("torch.")
        ).reshape(entry["shape"])
        for name, entry in json.loads(data[8:begin]).items()
    }


async def save_dense(tensors: Mapping[str, torch.Tensor], directory: Path) -> SaveStats:
    form, frozen, stats = Dense(), dict(tensors), SaveStats()
    body, ranges = form.lay_out(frozen), ranges_of(frozen.values())
    lease = get_engine().arena.lease(body.nbytes)
    snapshot = Snapshot(form, frozen, body, lease, stats, ranges)
    snapshot.copy()
    for tensor in tensors.values():
        tensor.zero_()
    plan = snapshot.plan(b"")
    async with LocalStore(str(directory)).draft("dense", plan.size) as draft:
        await Transfer(plan, lease.view, snapshot.filled, stats).into(draft)
        await draft.commit()
    lease.release()
    return stats


async def test_another_format_is_read_back_by_other_means(tmp_path: Path) -> None:
    tensors = {
        "w": torch.arange(7.0),
        "none": torch.zeros(0, 3),
        "large": torch.arange(9 << 20, dtype=torch.int32).view(-1, 3),
        "scalar": torch.tensor(5, dtype=torch.int16),
    }
    expected = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    stats = await save_dense(tensors, tmp_path)
    found = read_dense(tmp_path / "dense")
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert stats.write > 0


async def test_a_padded_shard_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    padded = torch.arange(35.0).view(5, 7)  # as FSDP2 pads a rank's shard: 3 of 5 rows are its own
    local = padded[1:4]
    assert (local.nbytes, local.untyped_storage().nbytes()) == (84, 140)
    await save_dense({"local": local}, tmp_path)
    np.testing.assert_array_equal(read_dense(tmp_path / "dense")["local"], np.arange(7.0, 28.0).reshape(3, 7))
    header = int.from_bytes((tmp_path / "dense").read_bytes()[:8], "little")
    assert (tmp_path / "dense").stat().st_size == 8 + header + 84


def test_a_tensor_with_gaps_is_no_range() -> None:
    with pytest.raises(ValueError, match="no range"):
        ranges_of([torch.zeros(4, 4)[:, 1:]])


def test_descriptions_and_directories_are_read_without_torch() -> None:
    script = """
        import sys
        sys.modules["torch"] = None
        sys.modules["asyncckpt"] = package = type(sys)("asyncckpt")
        package.__path__ = sys.argv[1:]
        import asyncckpt.layout.description, asyncckpt.layout.zip_reader, asyncckpt.layout.other_formats
        print("read")
    """
    import asyncckpt  # noqa: PLC0415 - where it lies

    assert run_python(script, asyncckpt.__path__[0]) == (0, "read\n", "")
