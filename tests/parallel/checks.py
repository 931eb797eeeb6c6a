"""What every layout must do besides equal numbers. Each check runs on the ranks and returns what the test asserts."""

from dataclasses import replace
from pathlib import Path

import torch

from mmtrain.config.schema import Parallel, Recipe
from mmtrain.optim.schedule import lr_factor
from mmtrain.parallel.box import Box
from mmtrain.parallel.engine import Engine
from mmtrain.parallel.groups import Groups, connect
from tests import tiny
from tests.parallel import harness
from tests.parallel.harness import Record

HALF = 3
State = dict[tuple[str, str], torch.Tensor]


def everything(folder: str, parallel: Parallel, steps: int, wanted: str) -> dict[str, object]:
    """On a rank: train with AdamW and SGD, then all checks. `wanted`: file with the reference's AdamW record."""
    groups = connect(parallel)
    recipe = tiny.recipe("adamw", parallel)
    records = {name: harness.train(tiny.recipe(name, parallel), groups, steps) for name in ("sgd", "adamw")}
    if groups.rank == 0:
        for name, record in records.items():
            torch.save(vars(record), Path(folder) / f"{name}.pt")
    found = {
        "discard": discard(recipe, groups, records["adamw"]),
        "resume": resume(recipe, groups, records["adamw"], steps),
        "evaluate": evaluate(recipe, groups),
        "frozen": frozen(recipe, groups),
    }
    resumed = continue_from(recipe, groups, harness.load_record(Path(wanted)), steps)
    if groups.rank == 0:
        torch.save(vars(resumed), Path(folder) / "resumed.pt")
    groups.close()
    return found


def one_step(engine: Engine, recipe: Recipe, groups: Groups, step: int, counts, poison: float = 1.0):
    """Forward and backward of step number `step` (from 0); every rank's loss times `poison`."""
    packs = tiny.packs(recipe.model, step)
    inputs = harness.inputs_of(recipe, packs, counts)
    return harness.accumulate(engine, recipe, groups, packs, inputs, accumulation=2, poison=poison)


def factor(recipe: Recipe, step: int) -> float:
    return lr_factor(step + 1, recipe.optim, recipe.steps)


def same(a: State, b: State) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    return sorted(f"{kind} {name}" for kind, name in a.keys() ^ b.keys()) + [
        f"{kind} {name}" for (kind, name), value in a.items() if (kind, name) in b and not value.equal(b[kind, name])
    ]


def rates(engine: Engine) -> list[float]:
    return [group["lr"] for group in engine._engine.optimizer.param_groups]


def discard(recipe: Recipe, groups: Groups, record: Record) -> dict[str, object]:
    """Two steps; a third whose gradients are dropped, one with a NaN on rank 0 alone; then the third step for good."""
    engine = harness.build(recipe, groups)
    counts = None
    for step in range(2):
        _, counts = one_step(engine, recipe, groups, step, counts)
        engine.step(factor(recipe, step))
    before, lr = harness.gather(engine, groups), rates(engine)
    one_step(engine, recipe, groups, 2, counts)
    engine.norms()
    engine.discard()
    dropped = same(before, harness.gather(engine, groups))
    one_step(engine, recipe, groups, 2, counts, poison=float("nan") if groups.rank == 0 else 1.0)
    update = engine.step(0.123)
    poisoned = same(before, harness.gather(engine, groups))
    untouched = lr == rates(engine) and engine.updates == 2
    _, counts = one_step(engine, recipe, groups, 2, counts)
    engine.step(factor(recipe, 2))
    return {
        "dropped": dropped,
        "poisoned": poisoned,
        "applied": update.applied,
        "untouched": untouched,
        "went on": same(record.state[2], harness.gather(engine, groups)),
    }


def reader(state: State):
    """A read function for Engine.load over whole tensors."""

    def read(name: str, kind: str, box: Box, flat: tuple[int, int]) -> torch.Tensor:
        return state[kind, name][box.slices()].reshape(-1)[flat[0] : flat[1]].float()

    return read


def resume(recipe: Recipe, groups: Groups, record: Record, steps: int) -> list[str]:
    """A new engine that loads this layout's own state after HALF steps ends where the first one did, to the bit."""
    last = continue_from(recipe, groups, record, steps)
    return same(record.state[-1], last.state[-1])


def continue_from(recipe: Recipe, groups: Groups, record: Record, steps: int) -> Record:
    """Steps HALF .. steps from the state of any record, through Engine.load into an engine that has other values."""
    engine = harness.build(recipe, groups)
    _, counts = one_step(engine, recipe, groups, 5, None)
    engine.step(1.0)
    engine.load(reader(record.state[HALF - 1]), HALF)
    counts = {part: value.float() for part, value in record.counts[HALF - 1].items()}
    return harness.train(recipe, groups, steps, engine=engine, first=HALF, counts=counts)


def evaluate(recipe: Recipe, groups: Groups) -> dict[str, object]:
    """The same loss with and without gradients, logits at some positions, and no trace left behind."""
    engine = harness.build(recipe, groups)
    packs = tiny.packs(recipe.model, 0)
    inputs = harness.inputs_of(recipe, packs, None)
    batch = tiny.collate(recipe.model, packs)
    losses = engine.evaluate(batch, inputs)
    positions = torch.arange(0, 64, 5)
    logits = engine.evaluate(batch, inputs, positions)
    one_step(engine, recipe, groups, 0, None)
    return {
        "total": float(losses.total),
        "graph": losses.total.requires_grad,
        "logits": logits.cpu(),
        "norm": engine.step(1.0).grad_norm,
    }


def frozen(recipe: Recipe, groups: Groups) -> dict[str, object]:
    """Only the connector learns: all else keeps its bits, is saved, and comes back by load."""
    recipe = replace(recipe, trainable=["connector.*"])
    engine = harness.build(recipe, groups)
    before = harness.gather(engine, groups)
    counts = None
    for step in range(2):
        _, counts = one_step(engine, recipe, groups, step, counts)
        update = engine.step(1.0)
    after = harness.gather(engine, groups)
    moved = [name for kind, name in before if kind == "param" and not before[kind, name].equal(after[kind, name])]
    other = {key: value + 1 for key, value in after.items()}
    engine.load(reader(other), 2)
    return {
        "moved": moved,
        "names": sorted(name for kind, name in after if kind == "param"),
        "parts": sorted(update.part_norms),
        "loaded": same(other, harness.gather(engine, groups)),
    }
