"""What programs of several ranks have in common that save and restore sharded models of every kind."""

# `model_of(kind, seed)` makes a model; `trained(kind, seed)` a model and an optimizer that has made a step.
MODELS = """\
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.device_mesh import init_device_mesh
from sharded_matrix import parallelized

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.down = nn.Linear(7, 5, bias=False)
        self.low = nn.Linear(5, 3).bfloat16()
        self.tiny = nn.Parameter(torch.randn(1))
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.scalar = nn.Buffer(torch.randn(()))

    def forward(self, x):
        return self.low(self.down(self.norm(self.up(x))).bfloat16()).float() * self.tiny

def model_of(kind, seed):
    torch.manual_seed(seed)
    return parallelized(Net(), kind)

def trained(kind, seed):
    model = model_of(kind, seed)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01 * seed)
    for n, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, seed + n)
    opt.step()
    return model, opt

def local(value):
    return value.to_local().detach().clone() if isinstance(value, DTensor) else value

def contents(model, opt):
    # Everything of this rank, as plain tensors and values.
    found = {}
    for part, states in zip(("model", "opt"), get_state_dict(model, opt)):
        stack = [((part,), states)]
        while stack:
            path, value = stack.pop()
            if isinstance(value, dict):
                stack += [((*path, key), item) for key, item in value.items()]
            elif isinstance(value, list):
                stack += [((*path, key), item) for key, item in enumerate(value)]
            else:
                value = local(value)
                found[path] = value.clone() if isinstance(value, torch.Tensor) else value
    return found

def differences(one, other):
    lines = [str(key) for key in one.keys() ^ other.keys()]
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if isinstance(a, torch.Tensor):
            same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        else:
            same = a == b
        if not same:
            lines.append(f"{key}: {a} {b}")
    return lines

def agree(what, flags, problem):
    # What the ranks' coordination does, with collectives.
    said = [None] * ranks
    dist.all_gather_object(said, (what, list(flags), problem))
    if len({w for w, _, _ in said}) > 1 or any(p for _, _, p in said):
        raise asyncckpt.SaveError(f"the ranks do not agree: {said}")
    return {flag: [r for r, (_, f, _) in enumerate(said) if flag in f] for _, fs, _ in said for flag in fs}
"""

# `finder(path)` finds checkpoints on all ranks together.
FINDER = """\
from asyncckpt._finder import Finder
from asyncckpt._loading.agreement import Ranks

def finder(path, filename="step-{step:08d}.pt"):
    found = Finder(path, None, filename, None, None)
    found._ranks_of = lambda state: Ranks(agree, rank, ranks)
    return found
"""
