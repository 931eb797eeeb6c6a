"""Whose checkpoint is it, and what does init_from take from it?"""

import pytest

from mmtrain.config.errors import CheckpointError
from mmtrain.run.comm import SingleProcess
from mmtrain.run.reader import open_checkpoint
from mmtrain.run.saver import Saver
from mmtrain.run.weights import check_same_model, plan_weights
from tests.run.ranks import STATE, tiny_tensors, whole


@pytest.fixture
def reader(tmp_path):
    saver = Saver(tmp_path, SingleProcess())
    saver.save(1, [whole(name, tensor) for name, tensor in tiny_tensors().items()], STATE)
    saver.wait()
    return open_checkpoint(tmp_path / "step_00000001")


def test_the_same_model_passes(reader):
    check_same_model(reader, reader.shapes(), "abc123")


def test_every_difference_is_listed(reader):
    shapes = {**reader.shapes(), "decoder.norm.weight": (4,), "new": (1,)}
    del shapes["scalar"]
    with pytest.raises(CheckpointError) as caught:
        check_same_model(reader, shapes, "abc123")
    text = str(caught.value)
    assert "step_00000001 is a checkpoint of another model: 1 tensors of the model are not in it: new;" in text
    assert "1 of its tensors are not in the model: scalar;" in text
    assert "1 shapes differ: decoder.norm.weight is [3], the model's is [4]." in text
    assert text.endswith("name it in init_from to take the weights that fit.")


def test_other_base_widths_are_refused(reader):
    with pytest.raises(CheckpointError, match=r"muP roles or base widths do not \(registry abc123 against def456\)"):
        check_same_model(reader, reader.shapes(), "def456")


TARGET = {
    "vision.positions": (17, 8),
    "vision.blocks.0.norm1.weight": (8,),
    "vision.blocks.0.mlp.router.weight": (4, 8),
    "vision.blocks.0.mlp.experts.up": (4, 16, 8),
    "vision.blocks.1.mlp.router.weight": (4, 8),
    "vision.blocks.1.mlp.experts.up": (4, 16, 8),
}
SOURCE = {
    "vision.positions": (10, 8),
    "vision.blocks.0.norm1.weight": (8,),
    "vision.blocks.0.mlp.up.weight": (16, 8),
    "vision.blocks.1.mlp.up.weight": (16, 8),
    "decoder.head.weight": (10, 8),
}
NAMES = {f"vision.blocks.{i}.mlp.experts.up": f"vision.blocks.{i}.mlp.up.weight" for i in range(2)}
ORIGINS = {name: (origin, (16, 8)) for name, origin in NAMES.items()}


def test_the_plan_says_where_each_tensor_comes_from():
    plan = plan_weights(TARGET, SOURCE, ORIGINS)
    assert plan.loaded == {"vision.blocks.0.norm1.weight": "vision.blocks.0.norm1.weight"}
    assert plan.upcycled == NAMES
    assert plan.interpolated == {"vision.positions": "vision.positions"}
    assert plan.fresh == ["vision.blocks.0.mlp.router.weight", "vision.blocks.1.mlp.router.weight"]
    assert plan.unused == ["decoder.head.weight"]
    assert [line.strip() for line in plan.report(TARGET, SOURCE).splitlines()] == [
        "loaded:    1 tensors, 8 values",
        "upcycled:    2 tensors, 1,024 values",
        "vision.blocks.*.mlp.experts.up  x2",
        "interpolated:    1 tensors, 136 values",
        "vision.positions",
        "fresh:    2 tensors, 64 values",
        "vision.blocks.*.mlp.router.weight  x2",
        "unused:    1 tensors, 80 values",
        "decoder.head.weight",
    ]


def test_experts_load_as_they_are_from_a_sparse_source():
    plan = plan_weights(TARGET, TARGET, ORIGINS | {})
    assert plan.fresh == list(ORIGINS)  # the map said dense, and there is no dense tensor
    assert plan_weights(TARGET, TARGET).loaded == {name: name for name in TARGET}


def test_a_shape_that_does_not_fit_names_both():
    with pytest.raises(
        CheckpointError, match=r"init_from: 1 shapes do not fit: w is \[2, 3\], w in the checkpoint is \[2, 4\]"
    ):
        plan_weights({"w": (2, 3), "v": (1,)}, {"w": (2, 4), "v": (1,)})


def test_slices_need_a_dense_tensor_of_the_width_that_they_add_up_to():
    origins = {name: (origin, (32, 8)) for name, (origin, _) in ORIGINS.items()}
    with pytest.raises(CheckpointError, match=r"2 shapes do not fit: vision.*.mlp.experts.up is made of \[32, 8\]"):
        plan_weights(TARGET, SOURCE, origins)


def test_an_empty_match_is_refused():
    with pytest.raises(
        CheckpointError, match=r"none of the checkpoint's 1 tensors \(model.embed\) is one of the model's 6 "
    ):
        plan_weights(TARGET, {"model.embed": (3,)})
