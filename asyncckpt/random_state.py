"""The state of a process's random number generators, as an entry of a state."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asyncckpt.errors import StateMismatchError, warn_caller

if TYPE_CHECKING:
    from collections.abc import Callable

_ACCELERATORS = ("cuda", "xpu", "mps")
_NAMES = ("python", "numpy", "torch", *_ACCELERATORS)
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
            **{
                kind: [getattr(torch, kind).get_rng_state(index) for index in range(count)]
                for kind, count in _device_counts().items()
            },
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Set every generator to its state in `state_dict`: all of them, or none.

        Devices that only the checkpoint or only this machine has are warned of; the others are restored.

        Raises:
            StateMismatchError: lists each state that does not fit its generator. Nothing was changed.
        """
        if not isinstance(state_dict, dict) or state_dict.keys() != set(_NAMES):
            found = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise StateMismatchError(f"a RandomState has the entries {list(_NAMES)}, not {found}")
        before = self.state_dict()
        try:
            _set_all(state_dict)
        except BaseException:
            _set_all(before)
            raise
        _warn_of_devices({kind: len(state_dict[kind]) for kind in _ACCELERATORS})


def _set_all(states: dict[str, Any]) -> None:
    problems = []
    for name in _NAMES:
        try:
            _set(name, states[name])
        except Exception as error:  # noqa: BLE001 - what is no state may raise anything
            problems.append(f"{name}: {type(error).__name__}: {error}")
    if problems:
        listing = "\n  ".join(problems)
        raise StateMismatchError(f"the random states do not fit, and none was changed:\n  {listing}")


def _set(name: str, state: Any) -> None:
    if name == "python":
        if not isinstance(state["gauss"], float | None):
            raise TypeError(f"gauss is a {type(state['gauss']).__name__}, not a float or None")
        random.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    elif name == "numpy":
        _set_numpy(_mapped(state, torch.Tensor, _array))
    elif name == "torch":
        torch.set_rng_state(state.cpu())
    else:
        module = getattr(torch, name)
        of_devices = [of_device.cpu() for of_device in state]
        for index, of_device in enumerate(of_devices[: module.device_count()]):
            module.set_rng_state(of_device, index)


def _set_numpy(state: Any) -> None:
    numpy_random: Any = np.random  # numpy's types lack some of its functions
    here = type(numpy_random.get_bit_generator()).__name__
    if state["bit_generator"] != here:
        raise ValueError(
            f"it is of a {state['bit_generator']}, numpy.random has a {here}; set that one with"
            " numpy.random.set_bit_generator first"
        )
    numpy_random.set_state(state)
    is_taken = _equal(numpy_random.get_state(legacy=False), state)  # numpy leaves out what is too much
    if not is_taken or not 0 <= state["state"].get("pos", 0) <= _MT19937_WORDS:
        raise ValueError(f"it is no state of a {here}")


def _device_counts() -> dict[str, int]:
    return {kind: getattr(torch, kind).device_count() for kind in _ACCELERATORS}


def _warn_of_devices(saved: dict[str, int]) -> None:
    here = _device_counts()
    lacking = [f"{kind}:{index}" for kind in saved for index in range(here[kind], saved[kind])]
    kept = [f"{kind}:{index}" for kind in saved for index in range(saved[kind], here[kind])]
    if lacking:
        warn_caller(
            f"random states of devices that this machine lacks were not restored: {', '.join(lacking)}"
        )
    if kept:
        warn_caller(
            f"the checkpoint has no random states of these devices, which keep theirs: {', '.join(kept)}"
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
