"""Runs the tiny recipe through the engine on any layout and records what a reference can be compared with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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


State = dict[tuple[str, str], torch.Tensor]


class Stored(NamedTuple):
    """A piece's place and values."""

    shape: tuple[int, ...]
    box: Box
    flat: tuple[int, int]
    values: torch.Tensor


Pieces = dict[tuple[str, str], Stored]


@dataclass
class Record:
    """What one layout did: per step, and the state after each step: of one rank as pieces, of all ranks as tensors."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    part_norms: list[dict[str, float]] = field(default_factory=list)
    counts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)
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
    """Steps first .. steps - 1; after each one this rank's pieces, as a checkpoint gets them.

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
        record.state.append(snapshot(engine))
    return record


def snapshot(engine: Engine) -> Pieces:
    """This rank's pieces, copied."""
    return {
        (piece.kind, piece.name): Stored(piece.global_shape, piece.box, piece.flat, piece.tensor.detach().cpu().clone())
        for piece in engine.pieces()
    }


def assemble(ranks: list[Pieces]) -> State:
    """(kind, name) -> the whole tensor, from the pieces of all ranks; each element must come exactly once."""
    whole: State = {}
    filled: dict[tuple[str, str], int] = {}
    for pieces in ranks:
        for key, stored in pieces.items():
            target = whole.get(key)
            if target is None:
                target = whole[key] = torch.full(stored.shape, torch.nan)
            block = target[stored.box.slices()].reshape(-1)
            assert block[stored.flat[0] : stored.flat[1]].isnan().all(), f"{key} has elements that two ranks write"
            block[stored.flat[0] : stored.flat[1]] = stored.values
            target[stored.box.slices()] = block.view(stored.box.shape)
            filled[key] = filled.get(key, 0) + stored.values.numel()
    missing = [key for key, value in whole.items() if filled[key] != value.numel()]
    assert not missing, f"no rank writes some elements of {missing}"
    return whole


def gather(engine: Engine, groups: Groups) -> State:
    """The whole state, on every rank."""
    return assemble(groups.all_gather_object(snapshot(engine)))


def layout_of(stage: int, tensor: int, expert: int, precision: str = "fp32") -> Parallel:
    """Shorthand."""
    return Parallel(tensor=tensor, expert=expert, zero_stage=stage, precision=precision)


def run_layout(folder: str, optimizers: list[str], parallel: Parallel, steps: int) -> None:
    """On a rank: train with each optimizer and write the record to `folder`."""
    groups = connect(parallel)
    for optimizer in optimizers:
        save_record(train(tiny.recipe(optimizer, parallel), groups, steps), folder, optimizer, groups.rank)
    groups.close()


def save_record(record: Record, folder: str, name: str, rank: int) -> None:
    """Write one rank's record."""
    torch.save(vars(record), Path(folder) / f"{name}.{rank}.pt")


def load_record(folder: Path, name: str) -> Record:
    """The record of all ranks: numbers of rank 0, states assembled."""
    ranks = [Record(**torch.load(path, weights_only=False)) for path in sorted(folder.glob(f"{name}.[0-9]*.pt"))]
    record = ranks[0]
    record.state = [assemble([rank.state[step] for rank in ranks]) for step in range(len(record.state))]
    return record


def sparse(recipe: Recipe) -> dict[str, int]:
    """Part -> number of sparse layers."""
    return sparse_layers(recipe.model)
