"""The lr figure: a sweep's held-out loss over the learning rate at several widths, one panel for each parametrisation.

    python -m tools.lr_figure SWEEP.yaml --out FOLDER

The sweep's variants are named PARAMETRISATION_WIDTH (mup_64, sp_64); those of base_WIDTH belong to all of them, since
at the base width all are one. Writes lr_figure.png, lr_figure.csv (every trial) and lr_figure.json (where each width's
optimum is, how far it moves, whether wider is better) of the trials that have ended.
"""

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from mmtrain.config.errors import ConfigError, UserError
from mmtrain.sweep.spec import VARIANT, read_sweep
from mmtrain.sweep.study import Study, Trial

LR = "optim.lr"
BASE = "base"
FACTS = ("width", "parameters", "active", "steps", "tokens", "flops", "seed")

Curves = dict[str, dict[int, dict[float, list[float]]]]
"""Parametrisation -> width -> lr -> loss by seed, infinite where training diverged; all in rising order."""


@dataclass(frozen=True)
class Optimum:
    """The best rate of one width."""

    lr: float
    loss: float
    """Mean over seeds."""
    interior: bool
    """Whether a lower and a higher rate were tried and are worse."""


def curves(trials: Sequence[Trial]) -> Curves:
    """The losses of the trials that ended. ConfigError: a variant's name is no PARAMETRISATION_WIDTH."""
    found: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for trial in trials:
        if trial.state in ("done", "diverged"):
            name, _, width = str(trial.params[VARIANT]).rpartition("_")
            if not name or not width.isdecimal():
                raise ConfigError(
                    f"variant {trial.params[VARIANT]} of the sweep is not named PARAMETRISATION_WIDTH, such as mup_64 "
                    f"or {BASE}_32, so its curve has no place in the figure; rename the sweep's variants"
                )
            found[name][int(width)][float(trial.params[LR])].append(trial.loss)
    shared = found.pop(BASE, {})
    if not found:
        raise ConfigError(f"no trial of a width beyond the base has ended: the sweep has only {BASE} so far")
    return {
        name: {width: dict(sorted(rates.items())) for width, rates in sorted({**shared, **found[name]}.items())}
        for name in sorted(found)
    }


def check_searched(searched: Iterable[str]) -> None:
    """ConfigError: the sweep searches something else than what the figure shows."""
    searched = list(searched)
    others = [key for key in searched if key not in (LR, "seed")]
    if LR not in searched or others:
        lacking = f"it has no {LR}" if LR not in searched else f"{', '.join(others)} would pass for seeds"
        raise ConfigError(
            f"the figure shows a search of {LR} and seed; the sweep searches {', '.join(searched)}, and {lacking}"
        )


def optimum(rates: dict[float, list[float]]) -> Optimum:
    """The rate with the lowest mean loss, of the rates with as many seeds as any has."""
    most = max(map(len, rates.values()))
    means = {lr: mean(losses) for lr, losses in sorted(rates.items()) if len(losses) == most}
    best = min(means, key=lambda lr: means[lr])
    return Optimum(best, means[best], min(means) < best < max(means))


def shift(widths: dict[int, Optimum]) -> float:
    """How far the best rate moves from the narrowest to the widest, in factors of 2; below 0 when it falls."""
    return math.log2(widths[max(widths)].lr / widths[min(widths)].lr)


def wider_is_better(found: dict[int, dict[float, list[float]]]) -> dict[float, bool]:
    """Rate tried at all widths -> whether each width's mean loss is lower than the next narrower one's."""
    common = set.intersection(*(set(rates) for rates in found.values()))
    means = {lr: [mean(found[width][lr]) for width in sorted(found)] for lr in sorted(common)}
    return {lr: all(wide < narrow for narrow, wide in pairwise(row)) for lr, row in means.items()}


def summary(found: Curves) -> dict[str, Any]:
    """Of each parametrisation: optimum by width, shift, loss at the narrowest's best rate, wider-is-better by rate."""
    said = {}
    for name, widths in found.items():
        best = {width: optimum(rates) for width, rates in widths.items()}
        carried = best[min(best)].lr
        said[name] = {
            "best": {width: {"lr": at.lr, "loss": at.loss, "interior": at.interior} for width, at in best.items()},
            "shift_in_factors_of_2": shift(best),
            "loss_at_the_narrowest_best_lr": {
                width: mean(rates[carried]) for width, rates in widths.items() if carried in rates
            },
            "wider_is_better": wider_is_better(widths),
        }
    return said


def plot(found: Curves, path: Path) -> Path:
    """A panel for each parametrisation: mean over seeds, the band from lowest to highest, a ring at each optimum."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(found), 4.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, (name, widths) in zip(panels, found.items(), strict=True):
        for width, rates in widths.items():
            ended = {lr: losses for lr, losses in rates.items() if all(map(math.isfinite, losses))}
            (line,) = axis.plot(
                list(ended), list(map(mean, ended.values())), "-o", markersize=4, label=f"width {width}"
            )
            axis.fill_between(
                list(ended), list(map(min, ended.values())), list(map(max, ended.values())), alpha=0.2, lw=0
            )
            at = optimum(rates)
            axis.plot([at.lr], [at.loss], "o", markersize=11, fillstyle="none", color=line.get_color())
        axis.set_xscale("log", base=2)
        axis.set(xlabel=f"{LR} (at the base width)", title=f"{name}: optimum moves by 2^{_shift(widths):+g}")
        axis.legend()
    panels[0].set_ylabel("held-out loss (band: lowest to highest seed)")
    FigureCanvasAgg(figure).print_png(path)
    return path


def _shift(widths: dict[int, dict[float, list[float]]]) -> float:
    return shift({width: optimum(rates) for width, rates in widths.items()})


def write_csv(trials: Sequence[Trial], path: Path) -> Path:
    """A line for each trial that ended."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "loss", VARIANT, LR, *FACTS])
        for trial in trials:
            if trial.state in ("done", "diverged"):
                values = [trial.params[VARIANT], trial.params[LR], *(trial.facts[fact] for fact in FACTS)]
                writer.writerow([trial.number, trial.state, trial.loss, *values])
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        sweep = read_sweep(args.sweep)
        check_searched(sweep.search)
        trials = Study(sweep, create=False).trials()
        found = curves(trials)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    ended = [trial for trial in trials if trial.state in ("done", "diverged")]
    said = {"command": f"python launch/sweep.py {args.sweep}", "trials": len(ended), "recipe": str(sweep.recipe)}
    data = sweep.recipe_of(ended[0].params, sweep.out).data
    said |= {"packs_a_step": data.global_batch, "positions_a_pack": data.sequence_length}
    said |= {"steps": sorted({trial.facts["steps"] for trial in ended})}
    said |= {"tokens_a_trial": sorted({round(trial.facts["tokens"]) for trial in ended})}
    said |= {"parameters": {trial.facts["width"]: trial.facts["parameters"] for trial in ended}}
    said |= {"active": {trial.facts["width"]: trial.facts["active"] for trial in ended}, "found": summary(found)}
    path = args.out / "lr_figure.json"
    path.write_text(json.dumps(said, indent=1) + "\n")
    for written in (path, write_csv(trials, args.out / "lr_figure.csv"), plot(found, args.out / "lr_figure.png")):
        console.print(str(written))
    for name, one in said["found"].items():
        rates = ", ".join(
            f"width {width} {at['lr']:g}{'' if at['interior'] else ' (at the edge)'}"
            for width, at in one["best"].items()
        )
        console.print(f"{name}: best lr {rates}; it moves by 2^{one['shift_in_factors_of_2']:+g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
