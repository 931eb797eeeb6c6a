"""A transfer from end to end: a proxy's best values at the target, against the target's own, and against SP.

    python -m tools.bench.transfer SWEEP.yaml TARGET.yaml --out DIR --questions F.jsonl --images DIR \\
        --mup-parent CHECKPOINT --sp-parent CHECKPOINT [--task vqa | matching] [--arms mup sp ...] [--seeds 0 1] \\
        [--factors 0.25 0.5 1 2 4] [--save NAME]

Carries the best point of SWEEP's finished study to TARGET as tools.transfer does, and trains the target in each of
    mup            muP with the carried values, and (but for a factor of 1) with its rate times each of --factors
    sp             SP (TARGET as it stands, which names no mup.base) with the same values
    mup_untuned    muP with TARGET's own values
    sp_untuned     SP with TARGET's own values, which is TARGET as it stands
each from the parent of its own parametrisation. A run is measured by its held-out loss and by what it answers, as
launch/evaluate.py does. A run that has ended lies in DIR and is not trained again: the same command goes on, and
several with other seeds or arms may share DIR. Prints one JSON line; a mean over seeds is null where one of them
diverged, and the cost of tuning is that of the study's trials, without parents.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.entry import run, setup
from tools.bench.record import tell

if TYPE_CHECKING:
    from mmtrain.config.schema import Recipe
    from mmtrain.sweep.study import Trial

RECIPE = "transferred.yaml"
MEASURED = "measured.json"
ARMS = ("mup", "sp", "mup_untuned", "sp_untuned")


class Run(NamedTuple):
    """One training of the target."""

    arm: str
    factor: float
    """On the transferred rate."""
    seed: int

    @property
    def parent(self) -> str:
        """mup or sp: whose parent it starts from."""
        return self.arm.partition("_")[0]

    def name(self) -> str:
        return f"{self.arm}_x{self.factor:g}_seed{self.seed}"


class Questions(NamedTuple):
    """What every run is asked."""

    task: str
    """vqa or matching."""
    file: Path
    images: Path
    limit: int
    """0: all."""


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--variant", help="which of the sweep's variants is the proxy")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--mup-parent", required=True, help="checkpoint that the target's muP runs start from")
    parser.add_argument("--sp-parent", required=True, help="checkpoint that the target's SP runs start from")
    parser.add_argument("--task", choices=["vqa", "matching"], default="vqa")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines, as launch/evaluate.py --data")
    parser.add_argument("--images", type=Path, required=True, help="folder that the image paths are relative to")
    parser.add_argument("--limit", type=int, default=0, help="questions to ask, from the first; 0: all")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["mup", "sp"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--save", default="", metavar="NAME", help="keep the line as results/NAME.json too")
    args = parser.parse_args()
    asked = Questions(args.task, args.questions, args.images, args.limit)
    parents = {"mup": args.mup_parent, "sp": args.sp_parent}
    planned = runs(args.arms, args.seeds, args.factors)
    found = measure(args.sweep, args.target, args.variant, args.out, parents, asked, planned)
    tell({"bench": args.save or "transfer", **found}, bool(args.save))
    return 0


def measure(
    sweep_file: Path,
    target: Path,
    variant: str | None,
    out: Path,
    parents: dict[str, str],
    asked: Questions,
    planned: Sequence[Run],
) -> dict[str, Any]:
    """Train and measure what is not there yet. UserError: the study has not ended, values cannot be carried, ..."""
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import load
    from mmtrain.sweep.spec import read_sweep
    from mmtrain.sweep.study import Study
    from mmtrain.sweep.transfer import unfinished
    from mmtrain.sweep.trial import step_cost
    from tools.transfer import carry

    if load(target).mup.base:
        raise ConfigError(f"{target} names mup.base, so as it stands it is no SP: take the base out of it")
    sweep = read_sweep(sweep_file)
    trials = Study(sweep, create=False).trials()
    if waiting := unfinished(sweep, trials):
        raise ConfigError(
            f"{sweep.out}: the study has not ended ({waiting}), so its best point may change; "
            f"python launch/sweep.py {sweep_file} goes on"
        )
    lines = carry(sweep, target, [f"init_from={parents['mup']}"], out / RECIPE, variant, [])
    origin = json.loads((out / RECIPE).with_suffix(".transfer.json").read_text())
    for name, parent in parents.items():
        check_parent(name, parent, origin["base"])
    rows = []
    for one in planned:
        recipe = recipe_of(one, target, out, origin, parents)
        rows.append({"arm": one.arm, "factor": one.factor, "seed": one.seed, **ended(recipe, asked)})
        print(f"{one.name()}: {rows[-1]}", file=sys.stderr)
    carried = load(out / RECIPE)
    return {
        "report": lines,
        "values": origin["values"],
        **costs(trials, origin["variant"], step_cost(carried).flops * carried.steps),
        "questions": asked.limit or "all",
        "found": summary(rows),
        "runs": rows,
    }


def check_parent(name: str, parent: str, base: dict[str, dict[str, int]]) -> None:
    """ConfigError unless the checkpoint was trained in the parametrisation that it is named for, muP's at `base`."""
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import load
    from mmtrain.run.reader import open_weights
    from mmtrain.run.saver import RECIPE as RECIPE_FILE
    from mmtrain.sweep.transfer import base_widths

    recipe = load(open_weights(Path(parent)).folder / RECIPE_FILE)
    if bool(recipe.mup.base) != (name != "sp"):
        said = "with mup.base, so it is no SP" if recipe.mup.base else "without mup.base, in SP"
        raise ConfigError(f"--{name}-parent {parent} was trained {said}; give a parent of the right one")
    trained = base_widths(recipe)
    differing = [
        f"{part}.{key} {trained[part].get(key)} there, {value} here"
        for part, widths in base.items()
        for key, value in widths.items()
        if trained[part].get(key) != value
    ]
    if name != "sp" and differing:
        raise ConfigError(
            f"--{name}-parent {parent} was trained at another base than the carried values hold at: "
            f"{'; '.join(differing)}; train it with mup.base={json.dumps(base)}"
        )


def runs(arms: Sequence[str], seeds: Sequence[int], factors: Sequence[float]) -> list[Run]:
    """The arms at the values as they are first, then the rest of the scan."""
    compared = [Run(arm, 1.0, seed) for arm in arms for seed in seeds]
    scan = [Run("mup", factor, seed) for factor in factors if factor != 1.0 for seed in seeds]
    return compared + (scan if "mup" in arms else [])


def recipe_of(one: Run, target: Path, out: Path, origin: dict[str, Any], parents: dict[str, str]) -> "Recipe":
    """The target's recipe for a run. origin: what tools.transfer wrote beside the carried recipe."""
    from mmtrain.config.load import load

    changes = [f"init_from={parents[one.parent]}", f"seed={one.seed}", f"out={out / one.name()}"]
    if one.arm == "mup":
        return load(out / RECIPE, [f"optim.lr={load(out / RECIPE).optim.lr * one.factor}", *changes])
    if one.arm == "mup_untuned":
        changes.append(f"mup.base={json.dumps(origin['base'])}")
    if one.arm == "sp":
        changes += [f"{key}={value}" for key, value in origin["values"].items()]
    return load(target, changes)


def ended(recipe: "Recipe", asked: Questions) -> dict[str, Any]:
    """How a run ended, and its scores if it did; trained now if it is not there.

    ConfigError: it was stopped before its end, or what is there was made with other values or questions.
    """
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import dump
    from mmtrain.run.manifest import NAME as MANIFEST
    from mmtrain.run.reader import open_weights
    from mmtrain.sweep.trial import discard_weights, run_trial

    out = Path(recipe.out)
    made = {
        "recipe": dump(recipe),
        "task": asked.task,
        "questions": str(asked.file),
        "limit": asked.limit,
        "parent": sha256((open_weights(Path(recipe.init_from)).folder / MANIFEST).read_bytes()).hexdigest(),
        "text of questions": sha256(asked.file.read_bytes()).hexdigest(),
    }
    if not (out / MEASURED).exists():
        outcome = run_trial(recipe, "all", lambda _: False)
        if outcome.ending == "interrupted":
            raise ConfigError(f"{out} was stopped before its end; the same command goes on")
        found = {"lr": recipe.optim.lr, "ending": outcome.ending, "steps": outcome.steps}
        if outcome.ending == "done":
            found["scores"] = {"loss": outcome.loss, **answers(out, asked)}
        (out / MEASURED).write_text(json.dumps({"made": made, "found": found}) + "\n")
        discard_weights(out)
    kept = json.loads((out / MEASURED).read_text())
    # what is not said there was not kept yet when it was made
    if differing := [key for key, value in made.items() if kept["made"].get(key, value) != value]:
        raise ConfigError(f"{out} was made with another {' and '.join(differing)}; remove it, or give a new --out")
    return kept["found"]


def answers(checkpoint: Path, asked: Questions) -> dict[str, float]:
    """The scores of launch/evaluate.py's report, without its counts."""
    from mmtrain.evaluate.prompts import Prompter
    from mmtrain.evaluate.tasks import Evaluator
    from mmtrain.inference import open_inference

    opened = open_inference(checkpoint)
    prompter = Prompter(opened.recipe, opened.tokenizer, asked.images, False)
    evaluator = Evaluator(prompter, opened.forward, max_new_tokens=8)
    found = getattr(evaluator, asked.task)(asked.file, asked.limit).metrics
    opened.close()
    return {name: value for name, value in found.items() if isinstance(value, float)}


def costs(study: Sequence["Trial"], variant: str, target_flops: float) -> dict[str, Any]:
    """FLOPs of the proxy's trials against those of one run of the target."""
    from mmtrain.sweep.spec import VARIANT

    trials = [trial for trial in study if trial.facts and trial.params[VARIANT] == variant]
    tuning = sum(trial.facts["flops"] for trial in trials)
    return {
        "tuning_trials": len(trials),
        "tuning_flops": tuning,
        "target_flops": target_flops,
        "tuning_over_target": tuning / target_flops,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every arm over its seeds; where rates were scanned, the best of them, and how far the carried one is above it."""
    arms: dict[str, list[dict[str, Any]]] = {}
    scan: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if row["factor"] == 1.0:
            arms.setdefault(row["arm"], []).append(row)
        if row["arm"] == "mup":
            scan.setdefault(row["factor"], []).append(row)
    found: dict[str, Any] = {arm: over_seeds(of_arm) for arm, of_arm in arms.items()}
    return found | (best_of(scan) if len(scan) > 1 else {})


def best_of(scan: dict[float, list[dict[str, Any]]]) -> dict[str, Any]:
    """The factor with the lowest mean loss; null where every one diverged."""
    losses = {
        factor: fmean(row["scores"]["loss"] if "scores" in row else math.inf for row in at)
        for factor, at in scan.items()
    }
    best = min(losses, key=lambda factor: losses[factor])
    if not math.isfinite(losses[best]):
        return {"own_best": None, "loss_above_own_best": None}
    interior = min(losses) < best < max(losses)
    above = losses[1.0] - losses[best] if math.isfinite(losses[1.0]) else None
    return {
        "own_best": {"factor": best, "interior": interior, **over_seeds(scan[best])},
        "loss_above_own_best": above,
    }


def over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each score of one setting: no mean where a seed diverged, which would flatter it."""
    scores = [row["scores"] for row in rows if "scores" in row]
    diverged = len(rows) - len(scores)
    found: dict[str, Any] = {"diverged": diverged}
    for name in dict.fromkeys(name for of_run in scores for name in of_run):
        values = [of_run[name] for of_run in scores if name in of_run]
        whole = len(values) == len(rows)
        found[name] = {
            "mean": fmean(values) if whole else None,
            "deviation": stdev(values) if whole and len(values) > 1 else None,
            "lowest": min(values),
            "highest": max(values),
        }
    return found


if __name__ == "__main__":
    run(main)
