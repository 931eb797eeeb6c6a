"""What one entry of a checkpoint file covers: a box of the global tensor, and a flat range inside that box.

ZeRO cuts a rank's box of a tensor into flat ranges, tensor and expert parallelism cut the tensor into boxes. Both
become plain boxes here (`runs`), so that assembling any layout from any other is nothing but intersecting boxes.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmtrain.config.errors import CheckpointError
from mmtrain.parallel.box import Box, Piece

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One piece as it lies in a file.

    key     name of the entry in the safetensors file: kind/name, with #2, #3 ... for further pieces of one tensor
    name    global tensor name
    kind    param, exp_avg or exp_avg_sq
    shape   global shape
    box     part of the global tensor
    flat    range of the box's elements in row-major order; a whole box has (0, box.numel)
    step    updates that a moment has seen; 0 for parameters
    """

    key: str
    name: str
    kind: str
    shape: Shape
    box: Box
    flat: tuple[int, int]
    step: int = 0

    @staticmethod
    def of(piece: Piece, number: int = 1) -> "Entry":
        """Entry of a rank's piece, the `number`-th of its tensor and kind."""
        suffix = f"#{number}" if number > 1 else ""
        key = f"{piece.kind}/{piece.name}{suffix}"
        return Entry(key, piece.name, piece.kind, tuple(piece.global_shape), piece.box, tuple(piece.flat), piece.step)

    def stored_shape(self) -> Shape:
        """Shape in the file: the box's own where all of it is there, flat otherwise."""
        return self.box.shape if self.flat == (0, self.box.numel) else (self.flat[1] - self.flat[0],)

    def as_json(self) -> list[Any]:
        """Plain values, for the file's metadata."""
        return [self.key, self.name, self.kind, self.shape, self.box.start, self.box.stop, self.flat, self.step]

    @staticmethod
    def from_json(value: list[Any]) -> "Entry":
        """The inverse of `as_json`."""
        key, name, kind, shape, start, stop, flat, step = value
        return Entry(key, name, kind, tuple(shape), Box(tuple(start), tuple(stop)), tuple(flat), step)


class Run(NamedTuple):
    """A box (in global coordinates) whose elements follow each other in a flat range, from element `offset` of it."""

    box: Box
    offset: int


def runs(box: Box, flat: tuple[int, int]) -> Iterator[Run]:
    """The elements `flat` of `box`, in row-major order, as boxes; at most 2 * dimensions - 1 of them."""
    for start, stop, first in _rows(box.shape, *flat):
        corner = tuple(map(sum, zip(box.start, start, strict=True)))
        end = tuple(map(sum, zip(box.start, stop, strict=True)))
        yield Run(Box(corner, end), first - flat[0])


def _rows(shape: Shape, first: int, last: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Boxes (start, stop, first element) that make up elements [first, last) of a row-major tensor."""
    if first >= last:
        return
    if not shape:
        yield (), (), 0
        return
    row = math.prod(shape[1:])
    top, bottom = -(-first // row), last // row  # whole rows: top up to bottom
    if top > bottom:  # a range inside one row
        parts = [(bottom, first - bottom * row, last - bottom * row)]
    else:
        parts = [(top - 1, first - (top - 1) * row, row)] if first < top * row else []
        if top < bottom:
            yield (top, *(0 for _ in shape[1:])), (bottom, *shape[1:]), top * row
        parts += [(bottom, 0, last - bottom * row)] if bottom * row < last else []
    for index, begin, end in parts:
        for start, stop, offset in _rows(shape[1:], begin, end):
            yield (index, *start), (index + 1, *stop), index * row + offset


def local(box: Box, origin: Box) -> tuple[slice, ...]:
    """Index of `box` in a tensor that holds `origin`."""
    return tuple(
        slice(start - zero, stop - zero) for start, stop, zero in zip(box.start, box.stop, origin.start, strict=True)
    )


def check_cover(entries: Iterable[Entry]) -> dict[str, Shape]:
    """Global shapes by name. CheckpointError where a tensor's pieces leave a gap, overlap, or disagree on its shape.

    Replicas (the same box and range twice) are allowed. Boxes come from a grid of cuts, so their volumes tell.
    """
    tensors: dict[tuple[str, str], dict[Box, set[tuple[int, int]]]] = {}
    shapes: dict[str, Shape] = {}
    for entry in entries:
        if shapes.setdefault(entry.name, entry.shape) != entry.shape:
            raise CheckpointError(f"{entry.name} has shape {shapes[entry.name]} on one rank, {entry.shape} on another")
        tensors.setdefault((entry.kind, entry.name), {}).setdefault(entry.box, set()).add(entry.flat)
    for (kind, name), boxes in tensors.items():
        for box, ranges in boxes.items():
            edges = [0, *itertools.chain.from_iterable(sorted(ranges)), box.numel]
            if any(end != begin for end, begin in zip(edges[::2], edges[1::2], strict=True)):
                raise CheckpointError(
                    f"{kind} of {name}: the ranges {sorted(ranges)} do not tile the {box.numel} elements of {box}"
                )
        covered, volume = sum(box.numel for box in boxes), math.prod(shapes[name])
        if covered != volume:
            raise CheckpointError(f"{kind} of {name}: the pieces of all ranks hold {covered} of {volume} elements")
    return shapes
