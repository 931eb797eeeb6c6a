"""Reading any part of a tensor from any layout."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config.errors import CheckpointError
from mmtrain.parallel.box import Box
from mmtrain.run import shards
from mmtrain.run.comm import SingleProcess
from mmtrain.run.entries import Entry, check_cover, runs
from mmtrain.run.reader import open_checkpoint
from mmtrain.run.saver import Saver
from tests.run.ranks import STATE, part, tiny_tensors, whole


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """Hundreds of checkpoints, none of which has to survive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.os, "fsync", lambda _: None)
        yield


SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def cuts(data, length):
    """Sorted cut points of [0, length], ends included."""
    inner = data.draw(st.lists(st.integers(1, length - 1), max_size=2, unique=True)) if length > 1 else []
    return [0, *sorted(inner), length]


def some_box(data, shape):
    corners = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in corners), tuple(b for _, b in corners))


def grid(data, shape):
    """Boxes of a random grid over the shape."""
    boxes = [Box((), ())]
    for length in shape:
        edges = cuts(data, length)
        boxes = [Box((*box.start, a), (*box.stop, b)) for box in boxes for a, b in itertools.pairwise(edges)]
    return boxes


@given(st.data(), SHAPES)
@settings(max_examples=200, deadline=None)
def test_runs_are_the_range_in_order(data, shape):
    tensor = torch.arange(math.prod(shape)).view(shape)
    box = some_box(data, shape)
    first, last = sorted((data.draw(st.integers(0, box.numel)), data.draw(st.integers(0, box.numel))))
    expected = tensor[box.slices()].reshape(-1)[first:last]
    found = list(runs(box, (first, last)))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    for run in found:  # contiguous, each where its offset says
        torch.testing.assert_close(tensor[run.box.slices()].reshape(-1), expected[run.offset :][: run.box.numel])
    assert sum(run.box.numel for run in found) == last - first


@given(st.data(), SHAPES)
@settings(max_examples=60, deadline=None)
def test_any_box_and_range_from_any_layout(tmp_path_factory, data, shape):
    folder = tmp_path_factory.mktemp("run")
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pieces = []
    for box in grid(data, shape):
        edges = cuts(data, box.numel)
        pieces += [part("w", tensor, box, (a, b)) for a, b in itertools.pairwise(edges)]
    saver = Saver(folder, SingleProcess())
    saver.save(1, data.draw(st.permutations(pieces)), STATE)
    saver.wait()
    reader = open_checkpoint(folder / "step_00000001")
    assert torch.equal(reader.read("w"), tensor)
    for _ in range(5):
        box = some_box(data, shape)
        assert torch.equal(reader.read("w", box=box), tensor[box.slices()])
        first, last = sorted((data.draw(st.integers(0, box.numel)), data.draw(st.integers(0, box.numel))))
        assert torch.equal(reader.read("w", box=box, flat=(first, last)), tensor[box.slices()].reshape(-1)[first:last])


def test_kinds_names_shapes_and_dtypes(tmp_path):
    weight = torch.randn(4, 2).bfloat16()
    pieces = [whole("b", weight), whole("a", torch.ones(3)), whole("b", torch.ones(4, 2), "exp_avg", step=9)]
    saver = Saver(tmp_path, SingleProcess())
    saver.save(3, pieces, STATE, {"tokenizer.json": b"{}"})
    saver.wait()
    reader = open_checkpoint(tmp_path / "step_00000003")
    assert reader.names() == ["a", "b"] and reader.names("exp_avg") == ["b"] and reader.names("exp_avg_sq") == []
    assert reader.shapes() == {"a": (3,), "b": (4, 2)}
    assert torch.equal(reader.read("b"), weight) and reader.read("b").dtype == torch.bfloat16
    assert reader.updates("b") == 9
    assert reader.manifest.state == STATE and reader.manifest.step == 3
    assert reader.file("tokenizer.json") == b"{}" and reader.file("recipe.yaml") == b"name: tiny\n"
    with pytest.raises(CheckpointError, match=r"step_00000003 holds no tensor 'c'"):
        reader.read("c")
    with pytest.raises(CheckpointError, match=r"step_00000003 holds no exp_avg of 'a'"):
        reader.read("a", "exp_avg")
    with pytest.raises(CheckpointError, match=r"reaches beyond a, which has shape \[3\]"):
        reader.read("a", box=Box((0,), (4,)))
    with pytest.raises(CheckpointError, match=r"holds no vocab.txt; it has rank_00000.safetensors"):
        reader.file("vocab.txt")


def test_a_whole_tensor_reads_with_the_safetensors_library(tmp_path):
    from safetensors.torch import load_file

    tensors = tiny_tensors()
    saver = Saver(tmp_path, SingleProcess())
    saver.save(1, [whole(name, tensor) for name, tensor in tensors.items()], STATE)
    saver.wait()
    loaded = load_file(tmp_path / "step_00000001" / "rank_00000.safetensors")
    assert loaded.keys() == {f"param/{name}" for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(loaded[f"param/{name}"], tensor)


def entry(box, flat, shape=(4, 2)):
    return Entry("param/w", "w", "param", shape, box, flat)


@pytest.mark.parametrize(
    "entries, message",
    [
        ([entry(Box((0, 0), (2, 2)), (0, 4))], r"param of w: the pieces of all ranks hold 4 of 8 elements"),
        (
            [entry(Box((0, 0), (4, 2)), (0, 3)), entry(Box((0, 0), (4, 2)), (4, 8))],
            r"\[\(0, 3\), \(4, 8\)\] do not tile",
        ),
        ([entry(Box((0, 0), (4, 2)), (0, 5)), entry(Box((0, 0), (4, 2)), (4, 8))], r"do not tile the 8 elements"),
        (
            [entry(Box((0, 0), (4, 2)), (0, 8)), entry(Box((0, 0), (4, 3)), (0, 12), (4, 3))],
            r"w has shape \(4, 2\) on one rank, \(4, 3\) on another",
        ),
    ],
)
def test_gaps_overlaps_and_other_shapes_are_refused(entries, message):
    with pytest.raises(CheckpointError, match=message):
        check_cover(entries)


def test_replicas_are_one():
    box = Box.whole((4, 2))
    assert check_cover([entry(box, (0, 8)), entry(box, (0, 8))]) == {"w": (4, 2)}
