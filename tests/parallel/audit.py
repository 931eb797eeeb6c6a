"""What the first step of AdamW did to each tensor: with eps far below every gradient it moves each entry by exactly its
rate, so a wrong multiplier, a flattened schedule or a scaled group shows in every layout without any reference."""

from dataclasses import dataclass, replace

from mmtrain.config.schema import Parallel, Recipe
from mmtrain.optim.groups import hyperparameters
from mmtrain.optim.schedule import lr_factor
from mmtrain.parallel.groups import Groups, connect
from tests import tiny
from tests.parallel import harness
from tests.parallel.harness import State

TOLERANCE = 1e-3
SMALL = 1e-3
"""Entries with a gradient below this share of their tensor's RMS are left out: fp32 may round what they say."""


@dataclass(frozen=True)
class Row:
    """One tensor."""

    name: str
    ratio: float
    """Median of |dW + lr * decay * W| / lr over the entries; NaN without any."""
    entries: int
    """Entries with a gradient."""
    reason: str
    """Why there are none; empty where there are."""


def recipe(parallel: Parallel) -> Recipe:
    """The tiny recipe as the audit wants it: no clipping, eps 1e-15; warm-up halves the first step's rates."""
    whole = tiny.recipe("adamw", parallel)
    return replace(whole, optim=replace(whole.optim, eps=1e-15, clip=0.0))


def first_step(groups: Groups, parallel: Parallel) -> tuple[State, list[Row]]:
    """On a rank: the whole initial state, and the rows. The same on every rank."""
    audited = recipe(parallel)
    engine = harness.build(audited, groups)
    before = harness.gather(engine, groups)
    packs = tiny.packs(audited.model, 0)
    harness.accumulate(engine, audited, groups, packs, harness.inputs_of(audited, packs, None), accumulation=2)
    factor = lr_factor(1, audited.optim, audited.steps)
    engine.step(factor)
    return before, rows(audited, factor, before, harness.gather(engine, groups))


def rows(audited: Recipe, factor: float, before: State, after: State) -> list[Row]:
    """Every tensor's row. The first moment after one step is (1 - beta1) times the gradient."""
    _, registry = harness.parts_of(audited)
    found = []
    for name, entry in registry.entries.items():
        lr, decay, _ = hyperparameters(name, entry, audited.optim)
        start, gradient = before["param", name].double(), after["exp_avg", name].double().abs()
        learned = gradient > SMALL * gradient.square().mean().sqrt()
        moved = (after["param", name].double() - start + lr * factor * decay * start).abs() / (lr * factor)
        ratio = float(moved[learned].median()) if learned.any() else float("nan")
        found.append(Row(name, ratio, int(learned.sum()), "" if learned.any() else "its gradient is zero"))
    return found


def on_ranks(parallel: Parallel) -> tuple[State, list[Row]]:
    """`first_step` in fresh processes."""
    groups = connect(parallel)
    found = first_step(groups, parallel)
    groups.close()
    return found
