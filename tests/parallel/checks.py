"""What every layout must do besides equal numbers. Each check runs on the ranks and returns what the test asserts."""

from dataclasses import replace

import torch

from mmtrain.config.schema import Moe, Optim, Parallel, Recipe
from mmtrain.model.upcycle import Copy, Experts, Fresh, Shared, grouped_rows, routed_part, shared_part, source_of
from mmtrain.optim.groups import param_groups
from mmtrain.optim.schedule import lr_factor
from mmtrain.parallel.box import Box
from mmtrain.parallel.engine import Engine
from mmtrain.parallel.groups import Groups, connect
from tests import tiny
from tests.parallel import audit, harness
from tests.parallel.harness import Pieces, Record, State

HALF = 3


def everything(folder: str, parallel: Parallel, steps: int, wanted: str) -> dict[str, object]:
    """On a rank: train with AdamW and SGD, then all checks. `wanted`: file with the reference's AdamW record."""
    groups = connect(parallel)
    recipe = tiny.recipe("adamw", parallel)
    records = {name: harness.train(tiny.recipe(name, parallel), groups, steps) for name in ("sgd", "adamw")}
    reference = Record(**torch.load(wanted, weights_only=False))
    records["own_eps"] = own_eps(groups, parallel, reference)
    found = {
        "upcycled": upcycled(parallel, groups),
        "discard": discard(recipe, groups, records["adamw"]),
        "resume": resume(recipe, groups, records["adamw"]),
        "evaluate": evaluate(recipe, groups),
        "frozen": frozen(recipe, groups),
        "audit": audit.first_step(groups, parallel),
    }
    start = reference.state[HALF - 1]
    records["resumed"] = continue_from(recipe, groups, start, reference.counts[HALF - 1], HALF + 2)
    for name, record in records.items():
        harness.save_record(record, folder, name, groups.rank)
    groups.close()
    return found


def one_step(engine: Engine, recipe: Recipe, groups: Groups, step: int, counts, poison: float = 1.0):
    """Forward and backward of step number `step` (from 0); every rank's loss times `poison`."""
    packs = tiny.packs(recipe.model, step)
    inputs = harness.inputs_of(recipe, packs, harness.routers_of(recipe, counts))
    return harness.accumulate(engine, recipe, groups, packs, inputs, accumulation=2, poison=poison)


def factor(recipe: Recipe, step: int) -> float:
    return lr_factor(step + 1, recipe.optim, recipe.steps)


def same(a: Pieces, b: Pieces) -> list[str]:
    """Names of pieces that are not equal to the bit."""
    return sorted(f"{kind} {name}" for kind, name in a.keys() ^ b.keys()) + [
        " ".join(key) for key in a.keys() & b.keys() if not a[key].values.equal(b[key].values)
    ]


def rates(engine: Engine) -> list[float]:
    return [group["lr"] for group in engine._engine.optimizer.param_groups]


def discard(recipe: Recipe, groups: Groups, record: Record) -> dict[str, object]:
    """Two steps; a third whose gradients are dropped, one with a NaN on rank 0 alone; then the third step for good."""
    engine = harness.build(recipe, groups)
    counts = None
    for step in range(2):
        counts = one_step(engine, recipe, groups, step, counts).counts
        engine.step(factor(recipe, step))
    before, lr = harness.snapshot(engine), rates(engine)
    one_step(engine, recipe, groups, 2, counts)
    engine.norms()
    engine.discard()
    dropped = same(before, harness.snapshot(engine))
    one_step(engine, recipe, groups, 2, counts, poison=float("nan") if groups.rank == 0 else 1.0)
    update = engine.step(0.123)
    poisoned = same(before, harness.snapshot(engine))
    untouched = lr == rates(engine) and engine.updates == 2
    counts = one_step(engine, recipe, groups, 2, counts).counts
    engine.step(factor(recipe, 2))
    return {
        "dropped": dropped,
        "poisoned": poisoned,
        "applied": update.applied,
        "untouched": untouched,
        "went on": same(record.state[2], harness.snapshot(engine)),
    }


def reader(state: State):
    """A read function for Engine.load over whole tensors."""

    def read(name: str, kind: str, box: Box, flat: tuple[int, int]) -> torch.Tensor:
        return state[kind, name][box.slices()].reshape(-1)[flat[0] : flat[1]].float()

    return read


def resume(recipe: Recipe, groups: Groups, record: Record) -> list[str]:
    """A new engine that loads this layout's own state after HALF steps makes the next step to the bit."""
    start = harness.assemble(groups.all_gather_object(record.state[HALF - 1]))
    again = continue_from(recipe, groups, start, record.counts[HALF - 1], HALF + 1)
    return same(record.state[HALF], again.state[0])


def continue_from(recipe: Recipe, groups: Groups, start: State, counts: dict[str, torch.Tensor], steps: int) -> Record:
    """Steps HALF .. steps - 1 after Engine.load into an engine that stands elsewhere."""
    engine = harness.build(recipe, groups)
    one_step(engine, recipe, groups, 5, None)
    engine.step(1.0)
    engine.load(reader(start), HALF)
    routers = harness.routers_of(recipe, counts)
    return harness.train(recipe, groups, steps, engine=engine, first=HALF, routers=routers)


def own_eps(groups: Groups, parallel: Parallel, reference: Record) -> Record:
    """One step from each of the reference's states, with the eps that a recipe has when it names none."""
    recipe = tiny.recipe("adamw", parallel)
    recipe = replace(recipe, optim=replace(recipe.optim, eps=Optim().eps))
    engine, record = harness.build(recipe, groups), Record()
    for step in range(len(reference.state)):
        routers = harness.routers_of(recipe)
        if step:
            engine.load(reader(reference.state[step - 1]), step)
            routers = harness.routers_of(recipe, reference.counts[step - 1])
        one = harness.train(recipe, groups, step + 1, engine=engine, first=step, routers=routers)
        for name, values in vars(one).items():
            getattr(record, name).extend(values)
    return record


PARTS = ("vision", "connector", "decoder")
UPCYCLED = (("vision",), ("connector",), ("decoder",), PARTS)
"""Parts that become experts."""
SLICED = Moe(num_experts=8, top_k=4, granularity=4, shared=2, routed_scale=2.0)
"""Four copies of two routed slices, beside two slices that are shared."""


def dense_recipe(parallel: Parallel) -> Recipe:
    """The tiny recipe without experts."""
    recipe = tiny.recipe("adamw", parallel)
    return replace(recipe, model=replace(recipe.model, **_with_moe(recipe, PARTS, Moe())))


def _with_moe(recipe: Recipe, parts: tuple[str, ...], moe: Moe) -> dict[str, object]:
    return {part: replace(getattr(recipe.model, part), moe=moe) for part in parts}


def upcycled(parallel: Parallel, groups: Groups) -> dict[object, dict[str, object]]:
    """Logits of models that are upcycled from one dense parent; routers of std 1, one expert that nobody chooses.

    The last one, under the key "sliced", has slices of the MLPs for experts, and shared ones, in all parts.
    """
    dense, (_, parent) = dense_recipe(parallel), harness.parts_of(dense_recipe(parallel))
    copies = Moe(num_experts=4, top_k=2, balance="bias")
    packs = tiny.packs(dense.model, 0)
    found = {}
    for key, parts, moe in (*((parts, parts, copies) for parts in UPCYCLED), ("sliced", PARTS, SLICED)):
        recipe = replace(dense, model=replace(dense.model, **_with_moe(dense, parts, moe)))
        model, registry = harness.parts_of(recipe)

        def make(name: str, box: Box) -> torch.Tensor:
            match source_of(name, parent.entries):
                case Copy(origin):
                    value = harness.start_values(parent, origin)
                case Experts(origin):
                    own = harness.start_values(parent, origin)
                    value = torch.stack([routed_part(origin, own, e, moe) for e in range(moe.num_experts)])  # noqa: B023
                case Shared(origin):
                    value = shared_part(origin, harness.start_values(parent, origin), moe)  # noqa: B023
                case Fresh():
                    draw = torch.Generator().manual_seed(len(name))
                    value = grouped_rows(torch.randn(registry[name].shape, generator=draw), moe)  # noqa: B023
            return value[box.slices()]

        engine = Engine.build(model, recipe, groups, lambda named: param_groups(named, registry, recipe), make)  # noqa: B023 - all in this turn
        inputs = harness.inputs_of(recipe, packs)
        batch = tiny.collate(recipe.model, packs)
        counts = engine.evaluate(batch, inputs).counts
        logits = engine.evaluate(batch, inputs, torch.arange(tiny.GLOBAL_BATCH * tiny.SEQUENCE))
        found[key] = {"logits": logits.cpu(), "counts": {part: value.cpu() for part, value in counts.items()}}
    return found


def evaluate(recipe: Recipe, groups: Groups) -> dict[str, object]:
    """The same loss with and without gradients, logits at some positions, and no trace left behind."""
    engine = harness.build(recipe, groups)
    packs = tiny.packs(recipe.model, 0)
    inputs = harness.inputs_of(recipe, packs)
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
    before = harness.snapshot(engine)
    loss, _, counts = one_step(engine, recipe, groups, 0, None)
    update = engine.step(1.0)
    one_step(engine, recipe, groups, 1, counts)
    engine.step(1.0)
    whole = harness.gather(engine, groups)
    moved = [name for kind, name in before if kind == "param" and has_moved(before, harness.snapshot(engine), name)]
    engine.load(reader({key: value + 1 for key, value in whole.items()}), 2)
    shifted = harness.gather(engine, groups)
    other = one_step(engine, recipe, groups, 0, None).loss
    engine.discard()
    engine.load(reader(harness.assemble(groups.all_gather_object(before)) | moments(whole)), 2)
    return {
        "moved": moved,
        "names": sorted(name for kind, name in whole if kind == "param"),
        "parts": sorted(update.part_norms),
        "loaded": [" ".join(key) for key, value in whole.items() if not shifted[key].equal(value + 1)],
        "losses": (loss, other, one_step(engine, recipe, groups, 0, None).loss),
    }


def has_moved(a: Pieces, b: Pieces, name: str) -> bool:
    """Whether parameter `name` has moved."""
    return not a["param", name].values.equal(b["param", name].values)


def moments(state: State) -> State:
    """The moments of a state."""
    return {key: value for key, value in state.items() if key[0] != "param"}
