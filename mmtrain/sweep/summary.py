"""What a sweep found: a table, a CSV of all trials, and plots."""

import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

from rich.table import Table

from mmtrain.sweep.spec import VARIANT, Sweep
from mmtrain.sweep.study import Trial, to_come

SHOWN = 12
"""Best trials in the table."""


def table(sweep: Sweep, trials: list[Trial]) -> Table:
    """How many trials there are of each state, and the best ones."""
    counts = {
        state: sum(trial.state == state for trial in trials)
        for state in ("done", "diverged", "pruned", "failed", "running")
    }
    words = ", ".join(f"{count} {state}" for state, count in [*counts.items(), ("to come", to_come(sweep, trials))])
    keys = _keys(sweep)
    found = Table(title=f"{sweep.name}: {words}", title_justify="left")
    for column in ("trial", "loss", *keys, "seed", "steps"):
        found.add_column(column, justify="left" if column == VARIANT else "right")
    for trial in best(trials)[:SHOWN]:
        values = [_short(trial.params.get(key, "")) for key in keys]
        found.add_row(
            str(trial.number), f"{trial.loss:.4f}", *values, str(trial.facts["seed"]), str(trial.facts["steps"])
        )
    return found


def best(trials: list[Trial]) -> list[Trial]:
    """Trials with a finite loss, the lowest first."""
    return sorted((trial for trial in trials if math.isfinite(trial.loss)), key=lambda trial: trial.loss)


def write_report(sweep: Sweep, trials: list[Trial]) -> list[Path]:
    """Write OUT/trials.csv and OUT/plots/*.png; returns their paths."""
    from mmtrain.sweep.plots import draw

    path = sweep.out / "trials.csv"
    facts = ("width", "parameters", "active", "steps", "tokens", "flops", "seed")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["trial", "state", "loss", *_keys(sweep), *(fact for fact in facts if fact not in sweep.search)]
        )
        for trial in trials:
            if trial.facts:
                values = [trial.params.get(key, "") for key in _keys(sweep)]
                rest = [trial.facts[fact] for fact in facts if fact not in sweep.search]
                writer.writerow([trial.number, trial.state, trial.loss, *values, *rest])
    return [path, *draw(sweep, trials, sweep.out / "plots")]


def curves(trials: list[Trial], key: str) -> dict[str, dict[float, tuple[float, float, float]]]:
    """Variant -> value of `key` -> (lowest, mean, highest) loss over the trials there; infinite where one diverged."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.state in ("done", "diverged") and key in trial.params:
            found[str(trial.params[VARIANT])][float(trial.params[key])].append(trial.loss)
    return {
        variant: {value: (min(losses), mean(losses), max(losses)) for value, losses in sorted(points.items())}
        for variant, points in found.items()
    }


def _keys(sweep: Sweep) -> list[str]:
    return [*([VARIANT] if len(sweep.variants) > 1 else []), *sweep.search]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
