"""Plots of a sweep: loss over the learning rate by variant, parallel coordinates, what matters most."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmtrain.sweep.spec import VARIANT, Choices, Sweep
from mmtrain.sweep.study import Trial, importance
from mmtrain.sweep.summary import curves

LR = "optim.lr"


def draw(sweep: Sweep, trials: list[Trial], folder: Path) -> list[Path]:
    """Write what there is enough for; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    done = [trial for trial in trials if trial.state == "done"]
    drawn = []
    if LR in sweep.search and done:
        drawn.append(_save(_loss_over_lr(sweep, trials), folder / "loss_over_lr.png"))
    numeric = [key for key in sweep.search if all(_is_number(trial.params.get(key)) for trial in done)]
    if len(numeric) > 1 and len(done) > 1:
        drawn.append(_save(_parallel(numeric, done), folder / "parallel.png"))
    shares = importance(sweep, trials)
    if len(shares) > 1:
        drawn.append(_save(_importance(shares), folder / "importance.png"))
    return drawn


def _loss_over_lr(sweep: Sweep, trials: list[Trial]) -> Figure:
    """One curve for each variant: mean over seeds, the band from lowest to highest; a cross where one diverged."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis: Axes = figure.subplots()
    grid = isinstance(sweep.search[LR], Choices)
    for variant, points in curves(trials, LR).items():
        finite = {lr: point for lr, point in points.items() if math.isfinite(point[2])}
        lowest, middle, highest = zip(*finite.values(), strict=True) if finite else ((), (), ())
        (line,) = axis.plot(list(finite), middle, "-o" if grid else "o", label=variant or sweep.name, markersize=4)
        axis.fill_between(list(finite), lowest, highest, alpha=0.2, color=line.get_color())
    axis.set(xscale="log", xlabel=f"{LR} (at the base width)", ylabel=f"held-out loss, {sweep.objective}")
    axis.set_title(f"{sweep.name}: loss over the learning rate")
    if axis.lines:
        axis.legend()
    return figure


def _parallel(keys: list[str], done: list[Trial]) -> Figure:
    """A line for each trial through its values, scaled to each key's range; the better the darker."""
    figure = Figure(figsize=(2 + 1.8 * len(keys), 4.5), layout="constrained")
    axis: Axes = figure.subplots()
    ranked = sorted(done, key=lambda trial: -trial.loss)
    scaled = {key: _scaled([float(trial.params[key]) for trial in ranked]) for key in keys}
    places = _scaled([trial.loss for trial in ranked], log=False)
    for number in range(len(ranked)):
        row = [*(scaled[key][number] for key in keys), places[number]]
        axis.plot(range(len(row)), row, color="tab:blue", alpha=0.15 + 0.8 * (number / len(ranked)) ** 3)
    axis.set_xticks(range(len(keys) + 1), [*keys, "loss"], rotation=20)
    axis.set_yticks([0, 1], ["lowest", "highest"])
    axis.set_title("trials; the darker the better")
    return figure


def _importance(shares: dict[str, float]) -> Figure:
    figure = Figure(figsize=(6, 1 + 0.5 * len(shares)), layout="constrained")
    axis: Axes = figure.subplots()
    axis.barh(list(shares)[::-1], list(shares.values())[::-1])
    axis.set(xlabel="share of the loss's variance (fANOVA)", xlim=(0, 1))
    return figure


def _scaled(values: list[float], log: bool = True) -> list[float]:
    """Values over their range, in logarithms; 0.5 where all are the same."""
    numbers = [math.log(value) if log and min(values) > 0 else value for value in values]
    low, high = min(numbers), max(numbers)
    return [0.5 if high == low else (number - low) / (high - low) for number in numbers]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and value != VARIANT


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure).print_png(path)
    return path
