"""Compare the values of tensors that two checkpoints hold in different parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from asyncckpt._inspection.tensor_values import ValueDifference, compare_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncckpt._inspection.inert import Tensor
    from asyncckpt._inspection.tensor_values import Side


class Part(NamedTuple):
    """A part of a tensor.

    Attributes:
        offsets: where in the tensor it begins.
        tensor: the part itself.
        side: the file or item that holds it.
    """

    offsets: tuple[int, ...]
    tensor: Tensor
    side: Side

    def ends(self) -> tuple[int, ...]:
        """Return where in the tensor it ends."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.tensor.shape, strict=True))

    def cut(self, begins: Sequence[int], ends: Sequence[int]) -> Tensor:
        """Return what is between two corners, which lie in it."""
        tensor, steps = self.tensor, zip(begins, self.offsets, self.tensor.stride, strict=True)
        first = tensor.offset + sum((begin - offset) * stride for begin, offset, stride in steps)
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return tensor._replace(offset=first, shape=sizes)


def compare_parts(a: Sequence[Part], b: Sequence[Part]) -> ValueDifference | None:
    """Compare two tensors of one shape, of which each has parts that make up all of it.

    Returns and raises what `compare_values` does.
    """
    result: ValueDifference | None = None
    for part_a, part_b, begins, ends in _meetings(a, b):
        in_a, in_b = part_a.cut(begins, ends), part_b.cut(begins, ends)
        found = compare_values(part_a.side, part_b.side, in_a, in_b)
        if found is None:
            return None
        if result is None:
            result = found
        else:
            result.numel += found.numel
            result.add(found)
    return result or ValueDifference(0)


_Meeting = tuple[Part, Part, tuple[int, ...], tuple[int, ...]]


def _meetings(a: Sequence[Part], b: Sequence[Part]) -> Iterator[_Meeting]:
    """Yield the parts of both that share elements, and the corners of what they share."""
    dims = range(len(a[0].offsets) if a else 0)
    # Along the dimension that is cut most, only few of them are side by side.
    axis = max(dims, key=lambda dim: len({part.offsets[dim] for part in (*a, *b)}), default=None)
    waiting = sorted(b, key=lambda part: 0 if axis is None else -part.offsets[axis])
    beside: list[Part] = []
    for part in sorted(a, key=lambda part: 0 if axis is None else part.offsets[axis]):
        ends = part.ends()
        while waiting and (axis is None or waiting[-1].offsets[axis] < ends[axis]):
            beside.append(waiting.pop())
        if axis is not None:
            beside = [other for other in beside if other.ends()[axis] > part.offsets[axis]]
        for other in beside:
            begins = tuple(map(max, part.offsets, other.offsets))
            stops = tuple(map(min, ends, other.ends()))
            if all(begin < stop for begin, stop in zip(begins, stops, strict=True)):
                yield part, other, begins, stops
