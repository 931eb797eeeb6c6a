"""Step 0 of a recipe as a checkpoint, written by one process without an engine: what tools that convert end with."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mmtrain.assemble import blueprint
from mmtrain.config.load import dump
from mmtrain.config.schema import PARTS, Moe, Recipe
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
    dense: Count
    """Parameters of the same model without experts."""


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
    parts = {part: replace(own, moe=Moe()) for part in PARTS if (own := getattr(recipe.model, part))}
    dense = replace(recipe.model, **parts)
    return Started(folder, weights.report, parameter_counts(recipe.model)["all"], parameter_counts(dense)["all"])


def summary(started: Started) -> str:
    """One line on parameters, before and after upcycling."""
    count, dense = started.count, started.dense
    before = f" (dense: {dense.total:,})" if count.total != dense.total else ""
    return f"{started.folder}: {count.total:,} parameters, {count.active:,} active for a token{before}"
