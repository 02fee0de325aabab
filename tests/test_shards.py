"""What a rank writes of its tensors: their own bytes, and a record for each."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor

from asyncckpt._snapshot.ranges import is_dense
from asyncckpt._snapshot.shards import shards_of
from asyncckpt.errors import SaveError
from sameness import raw
from states import filled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh


class Subclass(torch.Tensor):
    """A tensor of a class of its own, with a storage."""


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def bytes_of_range(tensor: torch.Tensor) -> list[int]:
    _, ranges = shards_of([tensor], ["a"])
    (source,), (offset,), (size,), _ = ranges
    content: list[int] = raw(source)[offset : offset + size].tolist()
    return content


def test_a_range_is_the_tensor_without_the_rest_of_its_storage() -> None:
    base = filled(100, torch.float32, 1)
    shards, ranges = shards_of([base[10:20], base[50:80].view(5, 6).t()], ["a", "b"])
    assert [source._cdata for source in ranges.sources] == [base.untyped_storage()._cdata] * 2
    assert (ranges.offsets, ranges.sizes) == ([40, 200], [40, 120])
    assert shards.sizes == [40, 120]


@pytest.mark.parametrize(
    "tensor",
    [
        filled(60, torch.int16, 1).view(6, 10)[:, 2:5],
        filled(6, torch.int16, 1).view(6, 1).expand(6, 4),
        filled(8, torch.complex64, 2).conj(),
        filled(8, torch.complex64, 2).conj().imag,
        torch._neg_view(filled(8, torch.float32, 2)),
        torch.nn.Parameter(filled(12, torch.float32, 2))[::2],
    ],
    ids=["gaps", "overlaps", "conjugate", "negative, with gaps", "negative", "of a parameter"],
)
def test_other_elements_are_copied(tensor: torch.Tensor) -> None:
    expected = tensor.detach().resolve_conj().resolve_neg().contiguous()
    assert bytes_of_range(tensor) == raw(expected.clone().untyped_storage()).tolist()


def test_a_parameter_and_a_subclass_are_written_as_plain_tensors() -> None:
    plain = filled(12, torch.float32, 2)
    kinds = [plain, torch.nn.Parameter(plain), plain.as_subclass(Subclass)]
    shards, ranges = shards_of(kinds, ["a", "b", "c"])
    assert len(set(shards.pickles)) == 1
    assert len({source._cdata for source in ranges.sources}) == 1


def test_the_local_tensor_of_a_dtensor_is_written(mesh: DeviceMesh) -> None:
    padded = filled(35, torch.float32, 1)  # as FSDP pads the shards of uneven dimensions
    local = padded[:21].view(7, 3)
    sharded = DTensor.from_local(local, mesh, [Shard(0)])
    shards, ranges = shards_of([sharded, torch.nn.Parameter(sharded)], ["a", "b"])
    assert ranges.sources[0]._cdata == padded.untyped_storage()._cdata
    assert (ranges.offsets, ranges.sizes) == ([0, 0], [84, 84])
    assert shards.pickles == shards_of([local, local], ["a", "b"])[0].pickles


def test_the_result_of_a_collective_is_waited_for(mesh: DeviceMesh) -> None:
    sharded = DTensor.from_local(filled(21, torch.float32, 1).view(7, 3), mesh, [Shard(0)])
    replicated = sharded.redistribute(placements=[Replicate()], async_op=True)
    assert bytes_of_range(replicated) == bytes_of_range(sharded)


def test_without_a_change_the_columns_are_the_same_objects() -> None:
    names = ["a", "b"]
    first, _ = shards_of([torch.zeros(3), torch.zeros(5)], names)
    second, ranges = shards_of([torch.ones(3), torch.ones(5)], names, first)
    assert second.pickles is first.pickles
    assert second.sizes is first.sizes
    assert ranges.sizes == first.sizes


@pytest.mark.parametrize(
    "other",
    [torch.zeros(5, dtype=torch.int32), torch.zeros(1, 5), torch.zeros(6), torch.zeros(5, 2).t()],
    ids=["dtype", "shape", "size", "stride"],
)
def test_a_changed_tensor_has_another_record(other: torch.Tensor) -> None:
    first, _ = shards_of([torch.zeros(3), torch.zeros(5)], ["a", "b"])
    second, _ = shards_of([torch.zeros(3), other], ["a", "b"], first)
    assert second.pickles[0] is first.pickles[0]
    assert second.pickles[1] != first.pickles[1]
    assert second == shards_of([torch.zeros(3), other], ["a", "b"])[0]
    assert len(second.records) == 2  # what is gone is forgotten


def test_records_keep_no_tensor_alive() -> None:
    tensor = torch.zeros(5)
    memory = weakref.ref(tensor)
    shards, _ = shards_of([tensor], ["a"])
    del tensor, _
    gc.collect()
    assert memory() is None
    assert shards.sizes == [20]


def without_memory() -> torch.Tensor:
    tensor = torch.zeros(5)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "tensor of torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "tensor of torch.sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensor"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "nested tensor",
        ),
        (lambda: torch.ones(3, device="meta"), "tensor on the meta device"),
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "TwoTensor"),
        (without_memory, "storage has 0 of 20 bytes"),
    ],
)
def test_what_has_no_bytes_of_its_own_is_refused(make: Any, kind: str) -> None:
    with pytest.raises(SaveError, match=f"^model.weight: .*{kind}"):
        shards_of([torch.ones(3), make()], ["a", "model.weight"])


def test_memory_that_was_given_up_since_the_last_time_is_noticed() -> None:
    tensor = torch.zeros(5)
    last, _ = shards_of([tensor], ["a"])
    with pytest.raises(SaveError, match=r"^a: its storage has 0 of 20 bytes"):
        shards_of([without_memory()], ["a"], last)


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_left_as_it_was(*, collecting: bool) -> None:
    try:
        (gc.enable if collecting else gc.disable)()
        shards_of([torch.ones(3)], ["a"])
        with pytest.raises(SaveError):
            shards_of([torch.ones(3, device="meta")], ["a"])
        assert gc.isenabled() is collecting
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(200))
def test_dense_are_tensors_whose_elements_have_all_places(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = random.integers(0 if seed % 5 == 0 else 1, 4, random.integers(0, 4)).tolist()
    stride = random.integers(0, 7, len(size)).tolist()
    if seed % 2:  # few random strides are dense
        stride = torch.empty(size).permute(*random.permutation(len(size)).tolist()).stride() if size else []
        size = list(torch.empty(size).shape)
    places = {sum(i * s for i, s in zip(index, stride, strict=True)) for index in np.ndindex(*size)}
    numel = int(np.prod(size))
    assert is_dense(size, stride) == (places == set(range(numel)))
