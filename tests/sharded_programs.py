"""What programs of several ranks begin with: sharded models, and the plans of stock DCP and of ours."""

PLANS = """\
import os, pickle
import numpy as np
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from asyncckpt._sharding.planning import LocalPlan, global_plan
from asyncckpt._sharding.states import collect_sharded

def stepped(model, *parameters, kind=torch.optim.AdamW, forward=True, **options):
    # An optimizer that has made a step.
    opt = kind(parameters or model.parameters(), lr=0.01, **options)
    if forward:
        model(torch.ones(4, 6)).sum().backward()
    else:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    opt.step()
    opt.zero_grad()
    return opt

def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5, bias=False), nn.LayerNorm(5))

def everywhere(value):
    found = [None] * ranks
    dist.all_gather_object(found, value)
    return found

def by_stock(name, state):
    dcp.save(state, checkpoint_id=f"{directory}-{name}")
    with open(f"{directory}-{name}/.metadata", "rb") as file:
        return pickle.load(file)

def by_us(state):
    plan = LocalPlan(state)
    payloads = everywhere(plan.encode())
    final = global_plan(payloads)
    kept = plan.keep(final.kept[rank])
    tensors, objects = kept.tensors(plan.flat), kept.objects(plan.flat)
    sizes = [t.to_local().shape if hasattr(t, "to_local") else t.shape for t in tensors]
    where = everywhere([[100 * i, 7 + i] for i in range(len(tensors) + len(objects))])
    extents = [np.array(rows, np.int64).reshape(-1, 2) for rows in where]
    metadata = pickle.loads(final.write("", [f"__{r}_0.distcp" for r in range(ranks)], extents))
    name, places = f"__{rank}_0.distcp", metadata.storage_data.items()
    own = {index: (p.offset, p.length) for index, p in places if p.relative_path == name}
    assert own == {index: tuple(row) for index, row in zip(kept.indices, where[rank])}
    for index, size in zip(kept.indices, sizes):
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        assert [chunk.sizes for chunk in chunks if chunk.offsets == index.offset] == [size], index
    assert [index.offset for index in kept.indices[len(tensors):]] == [None] * len(objects)
    return metadata

def compare(name, live, state=None):
    state = live if state is None else state
    collected = collect_sharded(live)[0]
    stock, ours = by_stock(name, state), by_us(collected)
    assert list(ours.state_dict_metadata.items()) == list(stock.state_dict_metadata.items()), name
    assert ours.planner_data == stock.planner_data, name
    assert items(ours) == items(stock), name
    told.append(len(items(ours)))

def items(metadata):
    # Which rank has each item, and the hint of its index.
    places = metadata.storage_data.items()
    return {index: (index.index, place.relative_path.split("_")[2]) for index, place in places}
"""
