"""Step 0 of a recipe as a checkpoint, written by one process without an engine: what tools that convert end with."""

from pathlib import Path
from typing import NamedTuple

from mmtrain.assemble import blueprint
from mmtrain.config.load import dump
from mmtrain.config.schema import Recipe
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.balance import RouterState
from mmtrain.model.build import Count, parameter_counts
from mmtrain.parallel.box import Box
from mmtrain.preflight import check_vocabulary
from mmtrain.run.comm import SingleProcess
from mmtrain.run.manifest import RunState
from mmtrain.run.saver import write_whole
from mmtrain.weights import Weights, stored_shapes


class Started(NamedTuple):
    """What was written."""

    folder: Path
    report: str
    """Which tensors were loaded, upcycled, interpolated, fresh and unused."""
    count: Count
    """Parameters of the model."""


def write_start(recipe: Recipe, tokenizer: Tokenizer, out: Path) -> Started:
    """Write out/step_00000000: the weights that a run of `recipe` starts from, one tensor at a time, in fp32.

    ConfigError, CheckpointError: weights, vocabulary or base widths do not fit; the step exists.
    """
    check_vocabulary(recipe.model, tokenizer)
    _, registry = blueprint(recipe)
    weights = Weights(recipe, registry, SingleProcess())
    state = RunState(
        optimizer_steps=0,
        recipe=dump(recipe),
        mesh={"world": 1, "tensor": 1, "expert": 1, "zero_stage": 0},
        registry_hash=registry.hash(),
        routers=RouterState.first(recipe.model).as_json(),
    )
    tensors = ((name, weights.make(name, Box.whole(shape))) for name, shape in stored_shapes(registry).items())
    folder = write_whole(out, 0, tensors, state, tokenizer.files())
    return Started(folder, weights.report, parameter_counts(recipe.model)["all"])
