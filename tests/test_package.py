"""The package's names: all there, and those that need torch imported on first use."""

from __future__ import annotations

import pytest

import asyncckpt
from support import run_python


def test_every_public_name_is_there_and_listed() -> None:
    assert sorted(asyncckpt.__all__) == asyncckpt.__all__
    assert set(asyncckpt.__all__) <= set(dir(asyncckpt))
    assert all(getattr(asyncckpt, name) is not None for name in asyncckpt.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'asyncckpt' has no attribute 'Chekpointer'"):
        _ = asyncckpt.Chekpointer  # type: ignore[attr-defined]


def test_torch_is_imported_with_the_first_name_that_needs_it() -> None:
    script = """
        import sys
        import asyncckpt
        from asyncckpt import BestK, Checkpoint, StoreError

        print(len(set(asyncckpt.__all__) - set(dir(asyncckpt))), "torch" in sys.modules)
        from asyncckpt import *
        print("torch" in sys.modules, Checkpointer is asyncckpt.Checkpointer)
    """
    assert run_python(script) == (0, "0 False\nTrue True\n", "")


def test_the_public_modules_are_there_without_an_import_of_their_own() -> None:
    script = """
        import sys
        import asyncckpt

        print({"checkpointer", "functions", "random_state", "stores"} <= set(dir(asyncckpt)))
        print(asyncckpt.stores.LocalStore.__name__, "torch" in sys.modules)
        print(asyncckpt.checkpointer.Checkpointer is asyncckpt.Checkpointer)
        print(asyncckpt.functions.save is asyncckpt.save, callable(asyncckpt.random_state.RandomState))
    """
    assert run_python(script) == (0, "True\nLocalStore False\nTrue\nTrue True\n", "")
