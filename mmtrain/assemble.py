"""From a recipe to an engine with weights: the model on the meta device, its roles, its pieces, their values."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from mmtrain.config.errors import CheckpointError, ConfigError
from mmtrain.config.load import load
from mmtrain.config.resume import resume_differences
from mmtrain.config.schema import Recipe
from mmtrain.model.balance import RouterState
from mmtrain.model.build import meta_model
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.registry import Registry
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.optim.groups import param_groups
from mmtrain.parallel.engine import Engine
from mmtrain.parallel.groups import Groups
from mmtrain.run.lock import RunLock
from mmtrain.run.reader import Reader, newest
from mmtrain.run.retain import clean_leftovers, committed
from mmtrain.run.saver import RECIPE
from mmtrain.run.weights import check_same_model
from mmtrain.weights import Weights, stored_shapes

log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Assembly:
    """A recipe's model, ready to train."""

    engine: Engine
    registry: Registry


class Done(NamedTuple):
    """How far the run in the folder had come."""

    step: int = 0
    cursor: Mapping[str, Any] | None = None
    guard: Mapping[str, Any] = MappingProxyType({})
    metrics: Mapping[str, float] = MappingProxyType({})


def blueprint(recipe: Recipe) -> tuple[VisionLanguageModel, Registry]:
    """The model on the meta device with muP's factors in its forward, and the table of its parameters.

    ConfigError: the base widths do not fit the model.
    """
    base = base_model_config(recipe.model, recipe.mup.base)
    scales = forward_scales(recipe.model, base, recipe.mup)
    with torch.device("meta"):
        model = VisionLanguageModel(recipe.model, scales, recipe.parallel.activation_checkpointing)
    return model, Registry.build(model, meta_model(base), recipe.mup)


def assemble(recipe: Recipe, groups: Groups, going_on: bool = False) -> Assembly:
    """Build, cut, fill and hand over to the engine. Every layout starts from the same numbers.

    going_on    a checkpoint of the run itself will be loaded: init_from and pretrained parts are not read
    ConfigError, CheckpointError: patterns that match nothing, weights that do not fit.
    """
    model, registry = blueprint(recipe)
    weights = Weights(recipe, registry, groups, going_on)
    if weights.report:
        log.info("weights from %s\n%s", weights.label, weights.report)
    engine = Engine.build(model, recipe, groups, lambda named: param_groups(named, registry, recipe), weights.make)
    return Assembly(engine, registry)


def interrupted(recipe: Recipe, groups: Groups, lock: RunLock) -> Reader | None:
    """The newest good checkpoint in the run folder; None where the run begins. Removes what killed saves have left.

    ConfigError: `resume: never` meets a checkpoint. CheckpointError: all of them are damaged.
    """
    out = Path(recipe.out)
    if groups.rank == 0:
        clean_leftovers(out, lock)
    groups.barrier()
    if recipe.resume == "never" and (steps := committed(out)):
        raise ConfigError(
            f"resume=never, but {out} has checkpoints (steps {sorted(steps)}): choose another out, or resume=auto"
        )
    return newest(out, groups)


def resume(recipe: Recipe, reader: Reader | None, built: Assembly, routers: RouterState) -> Done:
    """Go on from a checkpoint of this run; `Done()` when there is none.

    ConfigError: the recipe differs in what it computes. CheckpointError: the checkpoint is another model's.
    """
    if reader is None:
        return Done()
    check_same_model(reader, stored_shapes(built.registry), built.registry.hash())
    allowed, refused = resume_differences(load(reader.folder / RECIPE), recipe)
    if refused:
        raise ConfigError(
            f"{reader.folder} was trained with another recipe: {'; '.join(refused)}. Go back to its values, name these "
            "keys in resume_allow to change them on purpose, or choose another out"
        )
    _take(reader, built, routers)
    state, step = reader.manifest.state, reader.manifest.step
    log.info(
        "%s: going on after step %d (%s)%s", recipe.name, step, reader.folder, "".join(f"\n  {d}" for d in allowed)
    )
    return Done(step, state.cursor, state.guard, state.metrics)


def go_back(run_dir: Path, before: int, built: Assembly, routers: RouterState, groups: Groups) -> int:
    """Take weights, moments and router state of the newest good checkpoint before step `before`. Returns its step.

    0 when there is none: then nothing changes. Collective; no save may be under way.
    """
    reader = newest(run_dir, groups, before)
    if reader is None:
        return 0
    _take(reader, built, routers)
    return reader.manifest.step


def _take(reader: Reader, built: Assembly, routers: RouterState) -> None:
    """Make the state of a checkpoint the run's, and close it: retention may remove it while the run goes on."""
    state = reader.manifest.state
    built.engine.load(reader.read, state.optimizer_steps)
    if state.routers.keys() != routers.shares.keys():
        raise CheckpointError(f"{reader.folder}: router state of {sorted(state.routers)}, not {sorted(routers.shares)}")
    routers.load(state.routers)
    reader.close()
