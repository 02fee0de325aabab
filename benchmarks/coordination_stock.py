"""Do what rank 0 does when stock DCP plans a save of many ranks, without its messages."""

from __future__ import annotations

import pickle
import time

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

TENSORS = 300
LARGEST_PLAN = 1024  # ranks that are planned for here: the objects take some 2 kB an item


def stock_plan(rank: int, total: int) -> SavePlan:
    """Return the plan of DCP for a rank of a model that FSDP2 shards in rows; all tensors are alike."""
    properties = TensorProperties(dtype=torch.float32)
    items = [
        WriteItem(
            MetadataIndex(name, torch.Size([4 * rank, 0])),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size([4 * rank, 0]), torch.Size([4, 512])),
                properties,
                torch.Size([4 * total, 512]),
            ),
        )
        for name in (f"model.layers.{number}.weight" for number in range(TENSORS))
    ]
    return SavePlan(items, planner_data={item.index.fqn: tuple(item.index.fqn.split(".")) for item in items})


def stock(total: int) -> dict[str, float]:
    """Plan a save as stock DCP does on rank 0, of at most `LARGEST_PLAN` ranks."""
    planned = min(total, LARGEST_PLAN)
    pickles = [pickle.dumps(stock_plan(rank, planned)) for rank in range(planned)]
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    began = time.perf_counter()
    plans = [pickle.loads(data) for data in pickles]
    plans, metadata = planner.create_global_plan(plans)
    results = [pickle.dumps(plan) for plan in plans]
    took = time.perf_counter() - began
    assert len(metadata.state_dict_metadata) == TENSORS
    scale = total / planned
    return {
        "seconds, rank 0": took * scale,
        "bytes, rank 0": sum(map(len, pickles + results)) * scale,
        "bytes, others": len(pickles[0]) + len(results[0]),
        "measured ranks": planned,
    }
