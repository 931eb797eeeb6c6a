"""Runs the tiny recipe through the engine on any layout and records what a reference can be compared with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmtrain.config.schema import Recipe
from mmtrain.model.balance import RouterState
from mmtrain.model.probe import GradientProbe
from mmtrain.model.stepio import Losses, StepInputs, sparse_layers
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.init import initial
from mmtrain.mup.registry import Registry
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.optim.groups import param_groups
from mmtrain.optim.schedule import lr_factor
from mmtrain.parallel.box import Box
from mmtrain.parallel.engine import Engine, Norms
from mmtrain.parallel.groups import Groups
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
    terms: list[dict[str, float]] = field(default_factory=list)
    """Language loss by source (a sum over W), raw balance and z losses by part."""
    norms: list[float] = field(default_factory=list)
    part_norms: list[dict[str, float]] = field(default_factory=list)
    """By part, by experts and routers of a part, and by token kind at the decoder's input."""
    counts: list[dict[str, torch.Tensor]] = field(default_factory=list)
    state: list[Any] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


class Totals(NamedTuple):
    """What one step's forwards gave, over the global batch."""

    loss: float
    terms: dict[str, float]
    counts: dict[str, torch.Tensor]


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


def inputs_of(recipe: Recipe, packs: list[tiny.Pack], routers: RouterState | None = None) -> StepInputs:
    """Constants of a global batch: W, N by part, and what the routers carry over from the step before."""
    valid = {part: torch.tensor(value) for part, value in tiny.valid_tokens(recipe.model, packs).items()}
    return (routers or routers_of(recipe)).inputs(torch.tensor(tiny.label_weight(packs)), valid)


def routers_of(recipe: Recipe, counts: dict[str, torch.Tensor] | None = None) -> RouterState:
    """Router state before the first step, or after a step that counted `counts`."""
    state = RouterState.first(recipe.model)
    for part, bias in state.bias.items():
        if getattr(recipe.model, part).moe.balance == "bias":
            bias[:, tiny.UNUSED] = -10.0
    if counts is not None:
        state.update({part: value.double() for part, value in counts.items()})
    return state


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
) -> Totals:
    """Forward and backward of one step, this rank's loss times `poison`; sums over the global batch."""
    batches = tiny.micro_batches(recipe.model, own_packs(packs, groups), accumulation)
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        losses: Losses = engine.forward(batch, inputs)
        engine.backward(losses.total * poison, last=number == len(batches) - 1)
        found = {"loss": losses.total, "source": losses.by_source_sum / inputs.label_weight}
        for kind in ("balance", "z", "counts"):
            found |= {f"{kind} {part}": value for part, value in getattr(losses, kind).items()}
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value.detach().double()
    for value in sums.values():
        groups.sum_over_data(value)
    sources = {f"source {number}": value for number, value in enumerate(sums.pop("source").tolist())}
    counts = {part: sums.pop(f"counts {part}").float() for part in inputs.routers}
    loss = float(sums.pop("loss"))
    return Totals(loss, sources | {name: float(value) for name, value in sums.items()}, counts)


def train(
    recipe: Recipe,
    groups: Groups,
    steps: int,
    accumulation: int = 2,
    engine: Engine | None = None,
    first: int = 0,
    routers: RouterState | None = None,
) -> Record:
    """Steps first .. steps - 1; after each one this rank's pieces, as a checkpoint gets them.

    routers: the state after step first - 1.
    """
    engine = build(recipe, groups) if engine is None else engine
    record, routers = Record(), routers_of(recipe) if routers is None else routers
    for step in range(first, steps):
        packs = tiny.packs(recipe.model, step, count=recipe.data.global_batch)
        inputs = inputs_of(recipe, packs, routers)._replace(probe=GradientProbe(groups.device))
        totals = accumulate(engine, recipe, groups, packs, inputs, accumulation)
        norms = engine.norms(inputs.probe)
        update = engine.step(lr_factor(step + 1, recipe.optim, recipe.steps))
        assert update.applied
        routers.update({part: value.double() for part, value in totals.counts.items()})
        record.losses.append(totals.loss)
        record.terms.append(totals.terms)
        record.norms.append(update.grad_norm)
        record.part_norms.append(by_name(norms))
        record.counts.append(totals.counts)
        record.state.append(snapshot(engine))
    return record


def by_name(norms: Norms) -> dict[str, float]:
    """All norms but the whole one, with one name each."""
    found = dict(norms.part_norms)
    for kind in ("expert", "router", "position"):
        found |= {f"{kind} {name}": value for name, value in getattr(norms, f"{kind}_norms").items()}
    return found


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
            block = target[stored.box.slices()].flatten().clone()
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
