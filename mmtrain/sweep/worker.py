"""A worker of a sweep: takes trials one after another until there are none left."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mmtrain.config.check import check
from mmtrain.config.errors import ConfigError, UserError
from mmtrain.config.schema import Recipe
from mmtrain.run.guard import StopFlag, exit_code, stop_reason
from mmtrain.run.lock import InUse, RunLock
from mmtrain.sweep.spec import VARIANT, Budget, Sweep, Value
from mmtrain.sweep.study import Claim, Study
from mmtrain.sweep.trial import Cost, Outcome, discard_weights, ensure, facts, newest, run_trial, step_cost

log = logging.getLogger("mmtrain")

PATIENCE_SECONDS = 2.0

FREE = ("optim.", "mup.", "seed")
"""How searched keys begin that leave the mean step's cost alone."""

Costs = dict[tuple[tuple[str, Value], ...], Cost]
"""By the point's other values."""


def work(sweep: Sweep, study: Study, told: Callable[[], None]) -> int:
    """Do trials until none is left; `told` is called after each. Returns the exit code, not 0 when told to stop.

    UserError: a trial cannot run. Its own values are why: it is counted out. Anything else: it waits for the next
    worker, and the same command goes on once a person has mended what the error says.
    """
    costs: Costs = {}
    with StopFlag(sweep.out, fresh=False) as stop:
        while not stop.code() and (claim := study.claim()) is not None:
            if claim == "wait":
                time.sleep(PATIENCE_SECONDS)
                continue
            try:
                outcome = _one(sweep, study, claim, costs, stop)
            except (UserError, KeyboardInterrupt):
                study.put_back(claim)  # nothing to do for one that was counted out
                raise
            told()
            if outcome.ending == "interrupted":
                return outcome.code
        if why := stop.code():
            log.info("%s: stopped: %s", sweep.name, stop_reason(why))
        return exit_code(why) if why else 0


def _one(sweep: Sweep, study: Study, claim: Claim, costs: Costs, stop: StopFlag) -> Outcome:
    """Run one trial and keep its result."""
    out = sweep.out / "trials" / f"{claim.number:04d}"
    extra = [] if claim.seed is None else [f"seed={claim.seed}"]
    parent = sweep.parent_of(claim.params[VARIANT])
    if parent is not None:
        if code := _train_parent(parent, stop):
            outcome = Outcome("interrupted", math.nan, 0, [], code)
            study.finish(claim, outcome, {})
            return outcome
        extra.append(f"init_from={newest(parent)}")
    try:
        recipe, cost = _recipe(sweep, claim, out, tuple(extra), costs)
        log.info("trial %d: %s", claim.number, ", ".join(f"{key}={value}" for key, value in claim.params.items()))
        study.count_attempt(claim)
        outcome = run_trial(recipe, sweep.objective, study.judge(claim, recipe.steps))
    except InUse:
        raise
    except ConfigError:
        study.let_go(claim)
        raise
    study.finish(claim, outcome, facts(recipe, outcome, cost))
    if outcome.ending != "interrupted":
        discard_weights(out)
    return outcome


def _recipe(sweep: Sweep, claim: Claim, out: Path, extra: tuple[str, ...], costs: Costs) -> tuple[Recipe, Cost]:
    """A trial's recipe, as long as the budget allows, and what a step of it takes.

    ConfigError: the point is no recipe that can run. DataError: its data cannot be read.
    """
    recipe = sweep.recipe_of(claim.params, out, extra)
    shape = tuple((key, value) for key, value in claim.params.items() if not key.startswith(FREE))
    if shape not in costs:
        costs[shape] = step_cost(recipe)
    if sweep.budget is not None:
        recipe = replace(recipe, steps=affordable(sweep.budget, costs[shape]), epochs=0.0)
    check(recipe, 1)
    return recipe, costs[shape]


def _train_parent(parent: Recipe, stop: StopFlag) -> int:
    """Have the parent trained by whichever worker comes first; the others wait. The exit code when told to stop."""
    folder = Path(parent.out).with_suffix(".claim")
    while not stop.code():
        try:
            lock = RunLock(folder)
        except InUse:
            time.sleep(PATIENCE_SECONDS)
            continue
        try:
            return ensure(parent)
        finally:
            lock.release()
    return exit_code(stop.code())


def affordable(budget: Budget, cost: Cost) -> int:
    """Steps of a trial within its budget; at least 1."""
    steps = budget.tokens / cost.tokens if budget.tokens else budget.flops / cost.flops
    return max(1, math.floor(steps))
