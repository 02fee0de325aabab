"""The state of a process's random number generators, as an entry of a state."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asyncckpt._caller_warning import warn_caller
from asyncckpt.errors import StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

    Setter = Callable[[], object]

_ACCELERATORS = ("cuda", "xpu", "mps")
_MT19937_WORDS = 624


class RandomState:
    """The global random number generators of this process, as an entry of a state.

    They are those of `random`, of `numpy.random`, and of torch on the CPU and on each CUDA, XPU and MPS
    device. After a restore they go on as they went on after the save, bit for bit. The object itself holds
    nothing. All of its state dict loads with `weights_only=True`.

    Example::

        state = {"model": model, "opt": opt, "rng": asyncckpt.RandomState()}
        checkpointer.save(step, state)
        checkpointer.restore(state)
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator, in tensors and plain Python values.

        Returns:
            A dict. "python": "version", "words" (int64, shape (625,)) and "gauss" of `random.getstate()`.
            "numpy": what `numpy.random.get_state(legacy=False)` returns, with signed tensors for arrays.
            "torch": uint8, 1-D. "cuda", "xpu", "mps": a list with such a tensor for each device.
        """
        version, words, gauss = random.getstate()
        return {
            "python": {"version": version, "words": torch.tensor(words, device="cpu"), "gauss": gauss},
            "numpy": _mapped(np.random.get_state(legacy=False), np.ndarray, _tensor),  # noqa: NPY002 - the global one
            "torch": torch.get_rng_state(),
            **{kind: _device_states(getattr(torch, kind)) for kind in _ACCELERATORS},
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Set every generator to its state in `state_dict`: all of them, or none.

        Devices that only the checkpoint or only this machine has are warned of; the others are restored.

        Raises:
            StateMismatchError: lists each state that does not fit its generator. Nothing was changed.
        """
        checks: dict[str, Callable[[Any], Setter]] = {"python": _python, "numpy": _numpy, "torch": _torch}
        checks |= {kind: partial(_accelerator, kind) for kind in _ACCELERATORS}
        if not isinstance(state_dict, dict) or state_dict.keys() != checks.keys():
            found = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise StateMismatchError(f"a RandomState has the entries {list(checks)}, not {found}")
        setters, problems = [], []
        for name, check in checks.items():
            try:
                setters.append(check(state_dict[name]))
            except Exception as error:  # noqa: BLE001 - what is no state may raise anything
                problems.append(f"{name}: {type(error).__name__}: {error}")
        if problems:
            listing = "\n  ".join(problems)
            raise StateMismatchError(f"the random states do not fit, and none was changed:\n  {listing}")
        for setter in setters:
            setter()
        _warn_of_devices({kind: len(state_dict[kind]) for kind in _ACCELERATORS})


def _python(state: Any) -> Setter:
    gauss = state["gauss"]
    if not isinstance(gauss, float | None):
        raise TypeError(f"gauss is a {type(gauss).__name__}, not a float or None")
    whole = state["version"], tuple(state["words"].tolist()), gauss
    random.Random().setstate(whole)  # noqa: S311 - only to try it
    return partial(random.setstate, whole)


def _numpy(state: Any) -> Setter:
    numpy_random: Any = np.random  # numpy's types lack some of its functions
    here = type(numpy_random.get_bit_generator())
    if state["bit_generator"] != here.__name__:
        raise ValueError(
            f"it is of a {state['bit_generator']}, numpy.random has a {here.__name__}; set that one with"
            " numpy.random.set_bit_generator first"
        )
    whole = _mapped(state, torch.Tensor, _array)
    trial = np.random.RandomState(here())
    trial.set_state(whole)
    if (
        not _equal(trial.get_state(legacy=False), whole)
        or not 0 <= whole["state"].get("pos", 0) <= _MT19937_WORDS
    ):
        raise ValueError(f"it is no state of a {here.__name__}")
    return partial(np.random.set_state, whole)


def _torch(state: Any) -> Setter:
    torch.Generator().set_state(state.cpu())
    return partial(torch.set_rng_state, state.cpu())


def _accelerator(kind: str, states: Any) -> Setter:
    module = getattr(torch, kind)
    here = [state.cpu() for state in states][: module.device_count()]
    for index, state in enumerate(here):
        torch.Generator(device=f"{kind}:{index}").set_state(state)

    def set_all() -> None:
        for index, state in enumerate(here):
            module.set_rng_state(state, index)

    return set_all


def _device_states(module: Any) -> list[torch.Tensor]:
    return [module.get_rng_state(index) for index in range(module.device_count())]


def _warn_of_devices(saved: dict[str, int]) -> None:
    """Warn of devices that only the checkpoint has, or only this machine."""
    there, here = [], []
    for kind, count in saved.items():
        devices = getattr(torch, kind).device_count()
        there += [f"{kind}:{index}" for index in range(devices, count)]
        here += [f"{kind}:{index}" for index in range(count, devices)]
    if there:
        warn_caller(f"random states of devices that this machine lacks were not restored: {', '.join(there)}")
    if here:
        warn_caller(
            f"the checkpoint has no random states of these devices, which keep theirs: {', '.join(here)}"
        )


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return a state with each value of type `kind` in it changed."""
    if isinstance(value, dict):
        return {key: _mapped(item, kind, change) for key, item in value.items()}
    return change(value) if isinstance(value, kind) else value


def _tensor(array: Any) -> torch.Tensor:
    """Return unsigned words as signed ones of the same bits, which are a dtype of every torch."""
    return torch.from_numpy(array.view(f"i{array.itemsize}"))


def _array(tensor: torch.Tensor) -> Any:
    return tensor.cpu().numpy().view(f"u{tensor.itemsize}")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(item, other[key]) for key, item in one.items())
    return np.array_equal(one, other)
