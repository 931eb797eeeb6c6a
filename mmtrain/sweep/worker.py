"""A worker of a sweep: takes trials one after another until there are none left."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mmtrain.config.errors import UserError
from mmtrain.config.schema import Recipe
from mmtrain.run.lock import RunLock
from mmtrain.sweep.spec import VARIANT, Budget, Sweep, Value
from mmtrain.sweep.study import Claim, Study
from mmtrain.sweep.trial import Cost, Outcome, discard_weights, ensure, facts, run_trial, step_cost

log = logging.getLogger("mmtrain")

PATIENCE_SECONDS = 2.0


def work(sweep: Sweep, study: Study, told: Callable[[], None]) -> int:
    """Do trials until none is left; `told` is called after each. Returns the exit code, not 0 when told to stop.

    UserError: a trial's recipe cannot run at all; the trial is counted out.
    """
    costs: dict[Value, Cost] = {}
    while (claim := study.claim()) is not None:
        if claim == "wait":
            time.sleep(PATIENCE_SECONDS)
            continue
        outcome = _one(sweep, study, claim, costs)
        told()
        if outcome.ending == "interrupted":
            return outcome.code
    return 0


def _one(sweep: Sweep, study: Study, claim: Claim, costs: dict[Value, Cost]) -> Outcome:
    """Run one trial and keep its result."""
    variant = claim.params[VARIANT]
    out = sweep.out / "trials" / f"{claim.number:04d}"
    try:
        recipe = sweep.recipe_of(claim.params, out, _extra(sweep, claim))
        if variant not in costs:
            costs[variant] = step_cost(recipe)
        if sweep.budget is not None:
            recipe = replace(recipe, steps=affordable(sweep.budget, costs[variant]), epochs=0.0)
        log.info("trial %d: %s", claim.number, ", ".join(f"{key}={value}" for key, value in claim.params.items()))
        outcome = run_trial(recipe, sweep.objective, study.judge(claim, recipe.steps))
    except UserError:
        study.let_go(claim)
        raise
    study.finish(claim, outcome, facts(recipe, outcome, costs[variant]))
    if outcome.ending != "interrupted":
        discard_weights(out)
    return outcome


def _extra(sweep: Sweep, claim: Claim) -> tuple[str, ...]:
    """Values that depend on the claim: the seed of a repetition, the parent's weights."""
    found = [] if claim.seed is None else [f"seed={claim.seed}"]
    parent = sweep.parent_of(claim.params[VARIANT])
    if parent is not None:
        found.append(f"init_from={_parent_weights(parent)}")
    return tuple(found)


def _parent_weights(parent: Recipe) -> Path:
    """The parent's checkpoint, made by whichever worker comes first; the others wait for it."""
    folder = Path(parent.out).with_suffix(".claim")
    while True:
        try:
            lock = RunLock(folder)
            break
        except UserError:
            time.sleep(PATIENCE_SECONDS)
    try:
        return ensure(parent)
    finally:
        lock.release()


def affordable(budget: Budget, cost: Cost) -> int:
    """Steps of a trial within its budget; at least 1."""
    steps = budget.tokens / cost.tokens if budget.tokens else budget.flops / cost.flops
    return max(1, math.floor(steps))
