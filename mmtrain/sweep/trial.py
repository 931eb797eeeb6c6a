"""One trial: train a recipe in this process to its end, and say what it came to."""

import contextlib
import gc
import math
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mmtrain.config.schema import Recipe
from mmtrain.config.tokens import TokenKind
from mmtrain.data.loader import Loader
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.build import Flops, parameter_counts
from mmtrain.run.guard import EXIT_STOPPED, STOP_FILE
from mmtrain.run.metrics import NAME as METRICS
from mmtrain.run.metrics import read_metrics
from mmtrain.run.retain import committed
from mmtrain.train import train

SAMPLED_STEPS = 4
"""Steps of data that a step's cost is the mean of."""

LOOK_SECONDS = 0.5
"""Seconds between two looks at a trial's curve."""

Ending = Literal["done", "diverged", "pruned", "interrupted"]
Curve = list[tuple[int, float]]
"""(step, training loss) of the logged steps."""
Judge = Callable[[Curve], bool]
"""Whether a trial with this curve is to end now."""


@dataclass(frozen=True)
class Cost:
    """What one optimizer step of a recipe takes, by the first steps of its data."""

    tokens: float
    flops: float


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    ending: Ending
    loss: float
    """Held-out loss after the last step; infinite where training diverged, NaN where it did not end."""
    steps: int
    curve: Curve
    code: int = 0
    """Exit code of the training, for trials that were interrupted."""


def step_cost(recipe: Recipe) -> Cost:
    """Tokens and model FLOPs of a step. Reads a few steps of data; DataError where it cannot."""
    tokenizer = Tokenizer(recipe.data.tokenizer, recipe.data.chat_template)
    tokens = images = targets = 0.0
    with Loader(recipe, tokenizer, 0, 1, finite_batches=SAMPLED_STEPS) as loader:
        for step in loader:
            tokens += sum(int((batch.kind != TokenKind.PADDING).sum()) for batch in step.micro_batches)
            images += sum(int(batch.image_valid.sum()) for batch in step.micro_batches)
            targets += step.label_weight
    context = recipe.data.sequence_length / 2
    flops = Flops.of(recipe.model).step(tokens, images, targets, context)
    return Cost(tokens / SAMPLED_STEPS, flops / SAMPLED_STEPS)


def ensure(recipe: Recipe) -> int:
    """Train `recipe` to its end unless it has been; the exit code. The caller holds off other workers."""
    if recipe.steps and max(committed(Path(recipe.out)), default=0) >= recipe.steps:
        return 0
    try:
        return train(recipe)
    finally:
        _forget()


def newest(recipe: Recipe) -> Path:
    """The last checkpoint of a recipe that was trained."""
    return list(committed(Path(recipe.out)).values())[-1]


def run_trial(recipe: Recipe, objective: str, judge: Judge) -> Outcome:
    """Train `recipe` in this process, going on from its checkpoint if it was interrupted.

    A step with numbers that are not finite ends the trial, and is its result. UserError: the recipe cannot run at all.
    """
    out = Path(recipe.out)
    # The watcher ends a trial, never the guard: an error in the middle would leave its process group behind.
    patient = replace(recipe, guard=replace(recipe.guard, max_skips=sys.maxsize, rollback_after=0))
    with _Watcher(out, lambda curve: _diverged(curve) or judge(curve)) as watcher:
        try:
            code = train(patient)
        finally:
            _forget()
    curve = _curve(out)
    steps = curve[-1][0] if curve else 0
    stopped = code == EXIT_STOPPED and watcher.asked
    if code and not stopped:
        return Outcome("interrupted", math.nan, steps, curve, code)
    if _diverged(curve):
        return Outcome("diverged", math.inf, steps, curve)
    if stopped:
        return Outcome("pruned", math.nan, steps, curve)
    loss = read_metrics(out / METRICS)[-1]["held_out"][objective]
    return Outcome("diverged", math.inf, steps, curve) if loss is None else Outcome("done", loss, steps, curve)


def discard_weights(out: Path) -> None:
    """Delete a finished trial's checkpoints; its curve and report stay."""
    for folder in committed(out).values():
        shutil.rmtree(folder)


def facts(recipe: Recipe, outcome: Outcome, cost: Cost) -> dict[str, Any]:
    """What a study keeps of a trial besides its loss."""
    counts = parameter_counts(recipe.model)["all"]
    return {
        "ending": outcome.ending,
        "steps": outcome.steps,
        "tokens": cost.tokens * outcome.steps,
        "flops": cost.flops * outcome.steps,
        "parameters": counts.total,
        "active": counts.active,
        "width": recipe.model.decoder.hidden_size,
        "seed": recipe.seed,
        "curve": outcome.curve,
    }


class _Watcher:
    """Looks at a run's curve while it trains, and makes its stop file when the judge says so."""

    def __init__(self, out: Path, judge: Judge) -> None:
        self._out, self._judge = out, judge
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.asked = False

    def __enter__(self) -> "_Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            if self.asked or self._judge(_curve(self._out)):
                self.asked = True
                with contextlib.suppress(OSError):
                    (self._out / STOP_FILE).touch()  # again and again: a run that starts removes an old one


def _curve(out: Path) -> Curve:
    """The logged training losses so far; infinite where the step had a loss or gradient that was not a number.

    The guard leaves such a step out, and the held-out loss of weights that no longer move is finite.
    """
    path = out / METRICS
    lines = read_metrics(path) if path.exists() else []
    numbers = ("language_loss", "loss", "grad_norm")
    return [
        (line["step"], math.inf if any(line[name] is None for name in numbers) else line["language_loss"])
        for line in lines
    ]


def _diverged(curve: Curve) -> bool:
    return any(not math.isfinite(loss) for _, loss in curve)


def _forget() -> None:
    """Free the engine of the last training: its parts refer to each other."""
    gc.collect()
