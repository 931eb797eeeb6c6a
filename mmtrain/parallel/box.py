"""A box of a global tensor, and the flat ranges inside it that ZeRO gives to a rank."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch

Kind = Literal["param", "exp_avg", "exp_avg_sq"]


@dataclass(frozen=True)
class Box:
    """The half-open ranges [start, stop) of a tensor's dimensions; a scalar has none."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...] | torch.Size) -> "Box":
        """The box that is the tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the sides; 0 where there is nothing."""
        return tuple(max(0, stop - start) for start, stop in zip(self.start, self.stop, strict=True))

    @cached_property
    def numel(self) -> int:
        """Elements inside."""
        return prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the global tensor."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))

    def cut(self, dim: int, part: int, parts: int) -> "Box":
        """Slice number `part` of `parts` equal ones along `dim`. ValueError where they are not equal."""
        length = self.stop[dim] - self.start[dim]
        if length % parts:
            raise ValueError(f"{length} elements along dimension {dim} do not divide into {parts} equal parts")
        step = length // parts
        start, stop = list(self.start), list(self.stop)
        start[dim] = self.start[dim] + part * step
        stop[dim] = start[dim] + step
        return Box(tuple(start), tuple(stop))

    def clip(self, shape: tuple[int, ...]) -> "Box":
        """The part of the box inside a tensor of `shape`; it may be empty."""
        stop = tuple(min(a, b) for a, b in zip(self.stop, shape, strict=True))
        return Box(tuple(min(a, b) for a, b in zip(self.start, stop, strict=True)), stop)

    def intersect(self, other: "Box") -> "Box | None":
        """What both boxes hold; None when that is nothing."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, stop)


@dataclass(frozen=True)
class Piece:
    """One contiguous run of elements that one rank writes to a checkpoint.

    name          global name of the parameter.
    kind          the fp32 master weight, or a moment of Adam.
    global_shape  shape of the whole tensor (without the padding of the vocabulary).
    box           part of the tensor that this rank's tensor and expert coordinates hold.
    flat          half-open range inside the box, in row-major order: what ZeRO gives to this rank.
    tensor        the elements, fp32, 1-D, detached, a view of live memory: copy it before the next step.
    step          updates that the moments have seen (Adam's bias correction); 0 for kind "param".
    """

    name: str
    kind: Kind
    global_shape: tuple[int, ...]
    box: Box
    flat: tuple[int, int]
    tensor: torch.Tensor
    step: int = 0
