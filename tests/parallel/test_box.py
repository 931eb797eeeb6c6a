"""Boxes, against sets of indices."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.parallel.box import Box

RANGE = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted).map(tuple)
BOX = st.lists(RANGE, min_size=2, max_size=2).map(lambda r: Box(tuple(a for a, _ in r), tuple(b for _, b in r)))


def points(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True))))


@given(BOX, BOX)
def test_intersect_is_the_set_of_common_points(a: Box, b: Box) -> None:
    common = a.intersect(b)
    assert (points(common) if common else set()) == points(a) & points(b)


@given(BOX, st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_clip_keeps_the_points_inside(box: Box, shape: tuple[int, int]) -> None:
    assert points(box.clip(shape)) == points(box) & points(Box.whole(shape))


def test_cut_gives_equal_neighbours() -> None:
    parts = [Box.whole((4, 6)).cut(1, part, 3) for part in range(3)]
    tensor = torch.arange(24).view(4, 6)
    assert torch.equal(torch.cat([tensor[part.slices()] for part in parts], 1), tensor)
    assert {part.shape for part in parts} == {(4, 2)} and parts[0].numel == 8
    with pytest.raises(ValueError, match="6 elements along dimension 1 do not divide into 4 equal parts"):
        Box.whole((4, 6)).cut(1, 0, 4)
