"""Tell Lightning's code, and ours, from that of users, which may do anything."""

from __future__ import annotations

from typing import Any

_OURS = frozenset({"lightning", "pytorch_lightning", "asyncckpt"})
# Modules of Lightning's callbacks that change parameters, or call users' functions that may.
_CHANGING = frozenset(
    {"stochastic_weight_avg", "weight_averaging", "pruning", "finetuning", "batch_size_finder", "lr_finder"}
)


def package_of(owner: Any) -> str:
    """Return the package in which a class, a method or the class of an object was defined."""
    return str(getattr(owner, "__module__", "")).partition(".")[0]


def refuse_other_package(callback: Any, trainer: Any) -> None:
    """Raise TypeError if a trainer is not of the package of a callback's `trainer_class`."""
    if not isinstance(trainer, callback.trainer_class):
        wanted, given = package_of(callback.trainer_class), package_of(type(trainer))
        raise TypeError(
            f"{type(callback).__module__}.{type(callback).__name__} works with the Trainer of {wanted}, not"
            f" with that of {given}; import both from one package"
        )


def may_change_parameters(owner: Any, hook: str) -> bool:
    """Return whether a hook of a callback or a module may change parameters: whether it is a user's.

    One of Lightning's own counts if its callback is known to change them.
    """
    method = getattr(owner, hook, None)
    is_changing = str(getattr(method, "__module__", "")).rpartition(".")[2] in _CHANGING
    return package_of(method) not in _OURS or is_changing


def is_saved_by_users(trainer: Any, callback: Any) -> bool:
    """Return whether a user's code takes part in a save: a subclass, a patched trainer, a hook."""
    owners = [trainer.lightning_module, *trainer.callbacks]
    if getattr(trainer, "datamodule", None) is not None:
        owners.append(trainer.datamodule)
    methods = [getattr(o, n, None) for o in owners for n in ("on_save_checkpoint", "state_dict")]
    methods.remove(trainer.lightning_module.state_dict)  # what training changes
    parts = (type(callback), trainer.save_checkpoint, *filter(None, methods))
    return any(package_of(part) not in _OURS for part in parts)
