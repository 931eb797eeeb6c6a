"""One trial: train a recipe in this process to its end, and say what it came to."""

import contextlib
import gc
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Recipe
from mmtrain.config.tokens import TokenKind
from mmtrain.data.loader import Loader
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.build import parameter_counts, training_flops
from mmtrain.run.guard import EXIT_STOPPED, STOP_FILE, TrainingStopped
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
    flops = training_flops(recipe.model, tokens, images, targets, context)
    return Cost(tokens / SAMPLED_STEPS, flops / SAMPLED_STEPS)


def ensure(recipe: Recipe) -> Path:
    """The newest checkpoint of `recipe`, trained now if it is not there. The caller holds off other workers.

    ConfigError: it was stopped before its end.
    """
    out = Path(recipe.out)
    if not (out / "report.json").exists() or not committed(out):
        code = train(recipe)
        _forget()
        if code:
            raise ConfigError(f"parent {recipe.name} stopped with code {code} before its end; the same command goes on")
    return list(committed(out).values())[-1]


def run_trial(recipe: Recipe, objective: str, judge: Judge) -> Outcome:
    """Train `recipe` in this process, going on from its checkpoint if it was interrupted.

    A run with non-finite numbers is a result, not an error. UserError: the recipe itself cannot run.
    """
    out = Path(recipe.out)
    with _Watcher(out, judge) as watcher:
        try:
            code = train(recipe)
        except TrainingStopped:
            return Outcome("diverged", math.inf, _last_step(out), _curve(out))
        finally:
            _forget()
    curve = _curve(out)
    if code:
        pruned = code == EXIT_STOPPED and watcher.asked
        return Outcome("pruned" if pruned else "interrupted", math.nan, _last_step(out), curve, code)
    held_out = read_metrics(out / METRICS)[-1]["held_out"].get(objective)
    loss = math.inf if held_out is None else held_out
    return Outcome("done" if math.isfinite(loss) else "diverged", loss, _last_step(out), curve)


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
            if self._judge(_curve(self._out)):
                self.asked = True
                with contextlib.suppress(OSError):
                    (self._out / STOP_FILE).touch()
                return


def _curve(out: Path) -> Curve:
    """The logged training losses so far; infinite where a step's was not a number."""
    path = out / METRICS
    lines = read_metrics(path) if path.exists() else []
    return [(line["step"], math.inf if line["language_loss"] is None else line["language_loss"]) for line in lines]


def _last_step(out: Path) -> int:
    curve = _curve(out)
    return curve[-1][0] if curve else 0


def _forget() -> None:
    """Free the engine of the last training: its parts refer to each other."""
    gc.collect()
