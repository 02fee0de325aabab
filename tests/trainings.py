"""Small training runs of many kinds, for twins of which one saves while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    # Called with "forward" when a forward pass is over, and with "backward" when a backward pass is.
    Phase = Callable[[str], object]
    MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# Weights of 36 KiB, and as much for each in an optimizer's state: all of that may be deferred.
WIDTH = 96

momentum = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@dataclass
class Training:
    """A run.

    Attributes:
        objects: what its checkpoints hold, beside the state of the random numbers.
        step: trains on one batch.
    """

    objects: dict[str, Any]
    step: Callable[[], object] = field(repr=False)

    def state(self) -> dict[str, Any]:
        """Return the state, with stateful objects."""
        return {**self.objects, "rng": torch.get_rng_state()}

    def plain_state(self) -> dict[str, Any]:
        """Return the state as torch.save takes it."""

        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(item) for item in value]
            return value.state_dict() if hasattr(value, "state_dict") else value

        return {name: plain(value) for name, value in self.state().items()}


def perceptron(*more: nn.Module) -> nn.Sequential:
    """Return a model of several large weights, with dropout."""
    linear = [nn.Linear(WIDTH, WIDTH) for _ in range(6)]
    return nn.Sequential(*linear[:3], *more, nn.Dropout(0.1), nn.Tanh(), *linear[3:])


def loss_of(model: nn.Module, phase: Phase) -> torch.Tensor:
    """Return the loss of a batch, of which the backward pass is over, too."""
    loss: torch.Tensor = (model(torch.randn(4, WIDTH)) - 1).square().mean()
    phase("forward")
    loss.backward()
    phase("backward")
    return loss.detach()


def train(phase: Phase, make_optimizer: MakeOptimizer, model: nn.Module | None = None) -> Training:
    model = perceptron() if model is None else model
    opt = make_optimizer(model.parameters())

    def step() -> None:
        loss_of(model, phase)
        opt.step()
        opt.zero_grad()

    return Training({"model": model, "opt": opt}, step)


def with_batch_norm(phase: Phase) -> Training:
    """Have large running averages, which each forward pass changes."""
    features = 9000
    norm = nn.Sequential(nn.Linear(WIDTH, features), nn.BatchNorm1d(features), nn.Linear(features, WIDTH))
    return train(phase, momentum, perceptron(norm))


def with_ema(phase: Phase) -> Training:
    training = train(phase, torch.optim.AdamW)
    model = training.objects["model"]
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def step() -> None:
        training.step()
        ema.update_parameters(model)

    return Training({**training.objects, "ema": ema}, step)


def with_grad_scaler(phase: Phase) -> Training:
    """Skip steps whose gradients are infinite."""
    model = perceptron()
    opt = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(4, WIDTH)).float().square().mean()
        phase("forward")
        scaler.scale(loss * float("inf") if count % 3 == 1 else loss).backward()
        phase("backward")
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    return Training({"model": model, "opt": opt, "scaler": scaler}, step)


def accumulating(phase: Phase) -> Training:
    model = perceptron()
    opt = torch.optim.AdamW(model.parameters())

    def step() -> None:
        for _ in range(2):
            loss_of(model, phase)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad(set_to_none=False)

    return Training({"model": model, "opt": opt}, step)


def tied(phase: Phase) -> Training:
    model = perceptron()
    model[-1].weight = model[0].weight
    return train(phase, momentum, model)


def compiled_model(phase: Phase, backend: str) -> Training:
    torch.compiler.reset()
    model: Any = torch.compile(perceptron(), backend=backend)
    return train(phase, torch.optim.AdamW, model)


def compiled_step(phase: Phase, *, fused: bool = False) -> Training:
    torch.compiler.reset()  # a second compilation would leave no marks on the tensors of the state
    model = perceptron()
    opt = torch.optim.AdamW(model.parameters(), fused=fused)
    step_of_opt = torch.compile(opt.step, backend="eager")

    def step() -> None:
        loss_of(model, phase)
        step_of_opt()
        opt.zero_grad()

    return Training({"model": model, "opt": opt}, step)


def gan(phase: Phase) -> Training:
    maker, critic = perceptron(), perceptron()
    maker_opt = torch.optim.Adam(maker.parameters(), betas=(0.5, 0.99))
    critic_opt = torch.optim.RMSprop(critic.parameters())

    def step() -> None:
        fake = maker(torch.randn(4, WIDTH))
        phase("forward")
        critic(fake.detach()).mean().backward()
        phase("backward")
        critic_opt.step()
        critic_opt.zero_grad()
        (-critic(fake).mean()).backward()
        maker_opt.step()
        maker_opt.zero_grad()

    objects = {"maker": maker, "critic": critic, "maker_opt": maker_opt, "critic_opt": critic_opt}
    return Training(objects, step)


def with_closure(phase: Phase, make_optimizer: MakeOptimizer) -> Training:
    model = perceptron()
    opt = make_optimizer(model.parameters())

    def closure() -> float:
        opt.zero_grad()
        return loss_of(model, phase).item()

    return Training({"model": model, "opt": opt}, lambda: opt.step(closure))


def in_backward(phase: Phase) -> Training:
    """Have an optimizer for each parameter, which steps as soon as its gradient is known."""
    model = perceptron()
    optimizers = {parameter: torch.optim.AdamW([parameter]) for parameter in model.parameters()}

    def step_of(parameter: torch.Tensor) -> None:
        opt = optimizers[parameter]  # type: ignore[index] # hooks get what they were registered for
        opt.step()
        opt.zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step_of)

    def step() -> None:
        loss = model(torch.randn(4, WIDTH)).square().mean()
        phase("forward")
        phase("backward")  # whose first step ends what may be deferred
        loss.backward()

    return Training({"model": model, "opts": list(optimizers.values())}, step)


def with_schedulers(phase: Phase) -> Training:
    training = train(phase, momentum)
    opt = training.objects["opt"]
    warmup = torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3)
    cyclic = torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1, cycle_momentum=True)

    def step() -> None:
        training.step()
        warmup.step()
        cyclic.step()

    return Training({**training.objects, "warmup": warmup}, step)


def with_max_norm(phase: Phase) -> Training:
    """Have a parameter that the forward pass changes."""
    embedding = nn.Embedding(WIDTH, WIDTH, max_norm=1.0)
    opt = momentum(embedding.parameters())

    def step() -> None:
        opt.zero_grad()
        embedding(torch.randint(WIDTH, (16,))).square().mean().backward()
        phase("forward")
        opt.step()

    return Training({"model": embedding, "opt": opt}, step)


TRAININGS: dict[str, Callable[[Phase], Training]] = {
    "SGD": partial(train, make_optimizer=momentum),
    "SGD without momentum": partial(train, make_optimizer=partial(torch.optim.SGD, lr=0.05)),
    "SGD Nesterov": partial(train, make_optimizer=partial(momentum, nesterov=True)),
    "SGD fused": partial(train, make_optimizer=partial(momentum, fused=True)),
    "AdamW single": partial(train, make_optimizer=partial(torch.optim.AdamW, foreach=False)),
    "AdamW foreach": partial(train, make_optimizer=partial(torch.optim.AdamW, foreach=True)),
    "AdamW fused": partial(train, make_optimizer=partial(torch.optim.AdamW, fused=True)),
    "Adam amsgrad": partial(train, make_optimizer=partial(torch.optim.Adam, amsgrad=True)),
    "Adagrad": partial(train, make_optimizer=torch.optim.Adagrad),
    "ASGD": partial(train, make_optimizer=torch.optim.ASGD),
    "batch-norm": with_batch_norm,
    "EMA": with_ema,
    "GradScaler": with_grad_scaler,
    "gradient accumulation": accumulating,
    "tied weights": tied,
    "compiled model, eager": partial(compiled_model, backend="eager"),
    "compiled model, aot_eager": partial(compiled_model, backend="aot_eager"),
    "compiled step": compiled_step,
    "compiled step, fused": partial(compiled_step, fused=True),
    "GAN": gan,
    "LBFGS": partial(with_closure, make_optimizer=partial(torch.optim.LBFGS, lr=0.1, max_iter=3)),
    "SGD with a closure": partial(with_closure, make_optimizer=momentum),
    "fused AdamW with a closure": partial(
        with_closure, make_optimizer=partial(torch.optim.AdamW, fused=True)
    ),
    "optimizer in backward": in_backward,
    "schedulers": with_schedulers,
}
