"""Runs the tiny recipe through the engine on any layout and records what a reference can be compared with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmtrain.config.schema import Parallel, Recipe
from mmtrain.model.stepio import Losses, PartRouterInput, StepInputs, first_inputs, sparse_layers
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.init import initial
from mmtrain.mup.registry import Registry
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.optim.groups import param_groups
from mmtrain.optim.schedule import lr_factor
from mmtrain.parallel.box import Box
from mmtrain.parallel.engine import Engine
from mmtrain.parallel.groups import Groups, connect
from tests import tiny

SEED = 3


@dataclass
class Record:
    """What one layout did: per step, and by global name after each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    part_norms: list[dict[str, float]] = field(default_factory=list)
    counts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    state: list[dict[tuple[str, str], torch.Tensor]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def parts_of(recipe: Recipe) -> tuple[VisionLanguageModel, Registry]:
    """The model on the meta device and its muP registry."""
    base = base_model_config(recipe.model, recipe.mup.base)
    scales = forward_scales(recipe.model, base, recipe.mup)
    with torch.device("meta"):
        model = VisionLanguageModel(recipe.model, scales, recipe.parallel.activation_checkpointing)
        registry = Registry.build(model, VisionLanguageModel(base, Scales()), recipe.mup)
    return model, registry


def start_values(registry: Registry, name: str) -> torch.Tensor:
    """Initial values of tensor `name`; biases and gains too are drawn, so that none of them hides an error."""
    entry = registry[name]
    value = initial(name, entry, entry.shape, SEED)
    if entry.role.kind == "vector":
        noise = torch.Generator().manual_seed(sum(map(ord, name)))
        value = value + 0.1 * torch.randn(value.shape, generator=noise)
    return value


def build(recipe: Recipe, groups: Groups) -> Engine:
    """The engine of the tiny recipe."""
    model, registry = parts_of(recipe)

    def make(name: str, box: Box) -> torch.Tensor:
        return start_values(registry, name)[box.slices()]

    return Engine.build(model, recipe, groups, lambda named: param_groups(named, registry, recipe), make)


def inputs_of(recipe: Recipe, packs: list[tiny.Pack], counts: dict[str, torch.Tensor] | None) -> StepInputs:
    """Constants of a global batch: W, N by part, and the shares of the previous step's choices."""
    first = first_inputs(recipe.model, tiny.label_weight(packs), tiny.valid_tokens(recipe.model, packs))
    if counts is None:
        return first
    routers = {
        part: PartRouterInput(
            counts[part] / counts[part].sum(-1, keepdim=True).clamp(min=1), router.bias, router.valid_total
        )
        for part, router in first.routers.items()
    }
    return StepInputs(first.label_weight, routers)


def own_packs(packs: list[tiny.Pack], groups: Groups) -> list[tiny.Pack]:
    """A data rank's packs: a contiguous share."""
    share = len(packs) // groups.data_size
    return packs[groups.data_rank * share : (groups.data_rank + 1) * share]


def accumulate(
    engine: Engine,
    recipe: Recipe,
    groups: Groups,
    packs: list[tiny.Pack],
    inputs: StepInputs,
    accumulation: int,
    poison: float = 1.0,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Forward and backward of one step, this rank's loss times `poison`; the global loss and router counts."""
    batches = tiny.micro_batches(recipe.model, own_packs(packs, groups), accumulation)
    total = torch.zeros((), dtype=torch.float64)
    counts: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        losses: Losses = engine.forward(batch, inputs)
        engine.backward(losses.total * poison, last=number == len(batches) - 1)
        total += losses.total.detach().double()
        for part, value in losses.counts.items():
            counts[part] = counts.get(part, 0) + value
    groups.sum_over_data(total)
    for value in counts.values():
        groups.sum_over_data(value)
    return float(total), counts


def train(
    recipe: Recipe,
    groups: Groups,
    steps: int,
    accumulation: int = 2,
    engine: Engine | None = None,
    first: int = 0,
    counts: dict[str, torch.Tensor] | None = None,
) -> Record:
    """Steps first .. steps - 1; after each one the whole state as a checkpoint would hold it.

    counts: the router counts of step first - 1.
    """
    engine = build(recipe, groups) if engine is None else engine
    record = Record()
    for step in range(first, steps):
        packs = tiny.packs(recipe.model, step)
        inputs = inputs_of(recipe, packs, counts)
        loss, counts = accumulate(engine, recipe, groups, packs, inputs, accumulation)
        update = engine.step(lr_factor(step + 1, recipe.optim, recipe.steps))
        assert update.applied
        record.losses.append(loss)
        record.norms.append(update.grad_norm)
        record.part_norms.append(update.part_norms)
        record.counts.append(counts)
        record.state.append(gather(engine, groups))
    return record


def gather(engine: Engine, groups: Groups) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> the whole tensor, from the pieces of all ranks; each element must come exactly once."""
    mine = [(p.kind, p.name, p.global_shape, p.box, p.flat, p.tensor.detach().cpu().clone()) for p in engine.pieces()]
    whole: dict[tuple[str, str], torch.Tensor] = {}
    seen: dict[tuple[str, str], torch.Tensor] = {}
    for kind, name, shape, box, flat, values in (piece for rank in groups.all_gather_object(mine) for piece in rank):
        key = (kind, name)
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        count = seen.setdefault(key, torch.zeros(shape, dtype=torch.int8))
        for into, flat_values in ((target, values), (count, torch.ones(flat[1] - flat[0], dtype=torch.int8))):
            block = into[box.slices()].clone().view(-1)
            if into is count:
                block[flat[0] : flat[1]] += flat_values
            else:
                block[flat[0] : flat[1]] = flat_values
            into[box.slices()] = block.view(box.shape)
    wrong = [key for key, count in seen.items() if not bool((count == 1).all())]
    assert not wrong, f"elements written not exactly once: {wrong}"
    return whole


def layout_of(stage: int, tensor: int, expert: int, precision: str = "fp32") -> Parallel:
    """Shorthand."""
    return Parallel(tensor=tensor, expert=expert, zero_stage=stage, precision=precision)


def run_layout(folder: str, optimizers: list[str], parallel: Parallel, steps: int) -> None:
    """On a rank: train with each optimizer, rank 0 writes the records to `folder`."""
    groups = connect(parallel)
    for optimizer in optimizers:
        record = train(tiny.recipe(optimizer, parallel), groups, steps)
        if groups.rank == 0:
            torch.save(vars(record), Path(folder) / f"{optimizer}.pt")
    groups.close()


def load_record(path: Path) -> Record:
    """A record that `run_layout` wrote."""
    values: dict[str, Any] = torch.load(path, weights_only=False)
    return Record(**values)


def sparse(recipe: Recipe) -> dict[str, int]:
    """Part -> number of sparse layers."""
    return sparse_layers(recipe.model)
