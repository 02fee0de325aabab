"""What a file says of itself is believed only if it makes sense, whoever wrote it."""

from __future__ import annotations

import json

import pytest

from asyncckpt.errors import CorruptCheckpointError
from asyncckpt.layout.description import Description

SENSIBLE = {
    "format": 1,
    "sequence": 3,
    "step": 100,
    "metrics": {"loss": 0.5},
    "created": 1e9,
    "versions": {"torch": "2.13.0"},
}


def test_what_was_encoded_is_decoded() -> None:
    written = Description(3, 100, {"loss": 0.5}, 1e9)
    read = Description.decode(written.encode())
    assert (read.sequence, read.step, read.metrics, read.created) == (3, 100, {"loss": 0.5}, 1e9)
    assert read.versions.keys() == {"asyncckpt", "torch", "python"}
    assert (read.nbytes, read.ranks) == (None, None)


def test_what_is_said_of_a_folder_is_not_said_of_a_file() -> None:
    of_folder = Description(3, 100, {}, 1e9, nbytes=1 << 40, ranks=16)
    read = Description.decode(of_folder.encode())
    assert (read.nbytes, read.ranks) == (1 << 40, 16)
    assert not {"nbytes", "ranks"} & json.loads(Description(3, 100, {}, 1e9).encode()).keys()


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"sequence": float("inf")},
        {"sequence": None},
        {"step": float("nan")},
        {"metrics": {"loss": 10**400}},
        {"metrics": [1]},
        {"versions": ["torch"]},
        {"created": "yesterday"},
        {"ranks": "all"},
        {"nbytes": [1]},
    ],
)
def test_what_makes_no_sense_is_an_error(changed: dict[str, object]) -> None:
    assert Description.decode(json.dumps(SENSIBLE).encode()).step == 100
    with pytest.raises(CorruptCheckpointError):
        Description.decode(json.dumps(SENSIBLE | changed).encode())


@pytest.mark.parametrize("record", [b"", b"\xff", b"[]", b"[" * 40_000, b'{"format": 1}'])
def test_what_is_no_description_is_an_error(record: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        Description.decode(record)
