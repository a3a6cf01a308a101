"""Whole tensors and the boxes that ranks hold of them. Resharding is intersecting boxes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A rectangular part of a tensor: where it begins and how far it reaches, in elements per dim."""

    offset: Shape
    shape: Shape

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """The box that is a whole tensor of this shape."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """How many elements lie in it."""
        return math.prod(self.shape)

    @property
    def end(self) -> Shape:
        """The first element behind it, per dim."""
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    def intersection(self, other: Box) -> Box | None:
        """The part that lies in both, or None if there is no element in both."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(end - begin for begin, end in zip(start, map(min, self.end, other.end), strict=True))
        return Box(start, shape) if all(size > 0 for size in shape) else None

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """The index of this box in the elements of a box around it."""
        starts = [start - base for start, base in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))

    def __str__(self) -> str:
        return f"[{', '.join(f'{start}:{end}' for start, end in zip(self.offset, self.end, strict=True))}]"


@dataclass(frozen=True)
class Part(Generic[T]):
    """A box of a tensor, its elements, and whether this rank writes it. Of several replicas one is owned."""

    box: Box
    data: T
    owned: bool = True


@dataclass(frozen=True)
class Sharded(Generic[T]):
    """A tensor of which this rank holds some parts (or none): the shape is that of the whole."""

    shape: Shape
    parts: tuple[Part[T], ...]


def uncovered(shape: Shape, boxes: Iterable[Box]) -> str | None:
    """What is wrong with boxes that shall hold every element of a tensor exactly once; None if they do.

    Boxes without elements do not count.
    """
    whole = Box.whole(shape)
    filled = [box for box in boxes if box.volume]
    for box in filled:
        if len(box.offset) != len(shape) or whole.intersection(box) != box:
            return f"{box} lies outside of {whole}"
    # A sweep along the dim that is cut most: only boxes that reach past the present one's start can meet it.
    cuts = [len({box.offset[dim] for box in filled}) for dim in range(len(shape))]
    dim = cuts.index(max(cuts)) if cuts else 0
    active: list[Box] = []
    for box in sorted(filled, key=lambda box: box.offset[dim : dim + 1]):
        active = [other for other in active if not shape or other.end[dim] > box.offset[dim]]
        for other in active:
            if both := box.intersection(other):
                return f"{both} is held twice"
        active.append(box)
    held = sum(box.volume for box in filled)
    return (
        None if held == whole.volume else f"{whole.volume - held:,} of {whole.volume:,} elements are missing"
    )
