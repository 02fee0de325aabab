"""The data file of one rank in a checkpoint of many ranks, as stock DCP reads it.

It holds items one after another, each a whole zip file of the format of torch.load: first the tensors, whose
offsets depend on their sizes and records alone, then what else is saved, in the tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from asyncckpt.layout import torch_zip
from asyncckpt.layout.plan import Body, FilePlan, Format
from asyncckpt.layout.zip_format import ALIGNMENT, DESCRIPTOR_MAGIC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncckpt.types import Offsets


class Blob(NamedTuple):
    """An item that is no tensor.

    Attributes:
        data: `data.pkl` of an object without storages; or a whole file of torch.save.
        is_zip: whether it is a whole file.
    """

    data: bytes
    is_zip: bool = False


class Items(Protocol):
    """What the format has to know of a rank's items. The sequences must not be changed afterwards."""

    @property
    def pickles(self) -> Sequence[bytes]:
        """The record `data.pkl` of each tensor."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of the storage of each tensor."""

    @property
    def blobs(self) -> Sequence[Blob]:
        """What is saved beside tensors."""


class ItemFile(Format[Items, "ItemBody"]):
    """The format of a rank's data file. Lays out anew only if tensors differ from those before."""

    def __init__(self) -> None:
        self._frames: dict[tuple[bytes, int], _Frame] = {}
        self._body = self._laid_out([], [])

    def lay_out(self, frozen: Items) -> ItemBody:
        """Decide where the tensors lie."""
        if self._body.sizes != frozen.sizes or self._body.pickles != frozen.pickles:
            self._body = self._laid_out(frozen.pickles, frozen.sizes)
        return self._body

    def plan(self, frozen: Items, body: ItemBody, description: bytes) -> ItemPlan:
        """Put the blobs behind the tensors. The description is not for this file, but for `.metadata`."""
        del description
        zips = [blob.data if blob.is_zip else _zip_of(blob.data) for blob in frozen.blobs]
        padded = [zipped.ljust(_aligned(len(zipped)), b"\0") for zipped in zips]
        offsets = body.nbytes + _starts(np.array(list(map(len, padded)), dtype=np.int64))
        extents = np.column_stack((offsets, np.array(list(map(len, zips)), dtype=np.int64)))
        return ItemPlan(
            body,
            body.literals,
            b"".join(padded),
            body.slots,
            body.slot_ranges,
            np.concatenate((body.extents, extents)),
        )

    def _laid_out(self, pickles: Sequence[bytes], sizes: Sequence[int]) -> ItemBody:
        before, frames, rows = self._frames, dict[tuple[bytes, int], _Frame](), []
        for key in zip(pickles, sizes, strict=True):
            frame = frames.get(key)
            if frame is None:
                frame = frames[key] = before.get(key) or _frame(*key)
            rows.append(frame)
        self._frames = frames
        return _lay_out(rows, pickles, sizes)


@dataclass(frozen=True, eq=False)
class ItemBody(Body):
    """Where the bytes of each tensor lie in the file.

    Attributes:
        pickles: the record `data.pkl` of each tensor.
        sizes: bytes of each tensor.
        literals: (offset, bytes) of what is literal in the body, in file order.
        slots: where checksums go; int64, shape (m,).
        slot_ranges: of which tensor; int64, shape (m,).
        extents: offset and length of each tensor's zip; int64, shape (n, 2).
    """

    pickles: Sequence[bytes]
    sizes: Sequence[int]
    literals: tuple[tuple[int, bytes], ...]
    slots: Offsets
    slot_ranges: Offsets
    extents: Offsets


@dataclass(frozen=True, slots=True, eq=False)
class ItemPlan(FilePlan):
    """The plan of a rank's data file.

    Attributes:
        extents: offset and length in the file of each item, tensors first, then blobs, both in the order in
            which they were given; int64, shape (n, 2). The slice is a whole file of torch.load.
    """

    extents: Offsets


class _Frame(NamedTuple):
    """The bytes of a zip around those of its one storage.

    Attributes:
        head: what comes before the storage.
        foot: what comes behind it, padded to the alignment.
        length: of the zip without the padding.
        nbytes: of the zip with the padding.
        checksum: offset in the zip of the storage's checksum in the directory.
    """

    head: bytes
    foot: bytes
    length: int
    nbytes: int
    checksum: int


def _frame(pickle: bytes, size: int) -> _Frame:
    body = torch_zip.lay_out([size])
    plan = torch_zip.plan(body, pickle, None)
    (_, head), (stop, descriptor) = plan.literals
    nbytes = _aligned(plan.size)
    foot = (descriptor + plan.tail).ljust(nbytes - stop, b"\0")
    return _Frame(head, foot, plan.size, nbytes, int(plan.slots[-1]))


def _lay_out(frames: Sequence[_Frame], pickles: Sequence[bytes], sizes: Sequence[int]) -> ItemBody:
    heads, feet = [frame.head for frame in frames], [frame.foot for frame in frames]
    table = np.array(
        [(len(head), *frame[2:]) for head, frame in zip(heads, frames, strict=True)], dtype=np.int64
    )
    leads, lengths, steps, checksums = table.reshape(-1, 4).T
    offsets = _starts(steps)
    starts = offsets + leads
    stops = starts + np.asarray(sizes, dtype=np.int64)
    # Equal literals are one object: there are as many as tensors, and few different ones.
    known: dict[tuple[bytes, bytes], bytes] = {}
    around = zip([b"", *feet], [*heads, b""], strict=True)
    texts = [known.get(pair) or known.setdefault(pair, b"".join(pair)) for pair in around]
    (filled,) = np.nonzero(stops > starts)
    slots = np.column_stack((stops + len(DESCRIPTOR_MAGIC), offsets + checksums))[filled]
    return ItemBody(
        starts,
        stops,
        int(steps.sum()),
        pickles,
        sizes,
        tuple(zip([0, *stops.tolist()], texts, strict=True)),
        slots.ravel(),
        filled.repeat(2),
        np.column_stack((offsets, lengths)),
    )


def _zip_of(pickle: bytes) -> bytes:
    return torch_zip.plan(torch_zip.lay_out([]), pickle, None).tail


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _starts(nbytes: Offsets) -> Offsets:
    """Return where each of some parts begins that lie one after another."""
    return np.cumsum(nbytes, dtype=np.int64) - nbytes
