"""A transfer from end to end: a proxy's best values at the target, against the target's own scan and against SP.

    python -m tools.bench.transfer SWEEP.yaml TARGET.yaml --out DIR --questions F.jsonl --images DIR \\
        --mup-parent CHECKPOINT --sp-parent CHECKPOINT [--seeds 0 1] [--factors 0.25 0.5 1 2 4] [--save]

Carries the best point of SWEEP's finished study to TARGET as tools.transfer does. Trains the target with these values,
with its rate times each of --factors, and with the same values in SP (TARGET as it stands, which names no mup.base),
each from the parent of its own parametrisation. A run is measured by its held-out loss and its answers to questions.
A run that has ended lies in DIR and is not trained again: the same command goes on. Prints one JSON line; a mean over
seeds is null where one of them diverged, and the cost of tuning is that of the study's trials, without parents.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.entry import positive, run, setup
from tools.bench.record import tell

if TYPE_CHECKING:
    from mmtrain.config.schema import Recipe
    from mmtrain.sweep.spec import Sweep

RECIPE = "transferred.yaml"
MEASURED = "measured.json"
SP = "sp"


class Run(NamedTuple):
    """One training of the target."""

    arm: str
    """mup or sp."""
    factor: float
    """On the transferred rate."""
    seed: int

    def name(self) -> str:
        return f"{self.arm}_x{self.factor:g}_seed{self.seed}"


class Questions(NamedTuple):
    """What every run is asked."""

    file: Path
    images: Path
    limit: int


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--variant", help="which of the sweep's variants is the proxy")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--mup-parent", required=True, help="checkpoint that the target's muP runs start from")
    parser.add_argument("--sp-parent", required=True, help="checkpoint that the target's SP runs start from")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines, as launch/evaluate.py --task vqa")
    parser.add_argument("--images", type=Path, required=True, help="folder that the image paths are relative to")
    parser.add_argument("--limit", type=positive, default=1000, help="questions to ask, from the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--save", action="store_true", help="keep the line in results/ too")
    args = parser.parse_args()
    asked = Questions(args.questions, args.images, args.limit)
    parents = {"mup": args.mup_parent, SP: args.sp_parent}
    tell(measure(args.sweep, args.target, args.variant, args.out, parents, asked, args.seeds, args.factors), args.save)
    return 0


def measure(
    sweep_file: Path,
    target: Path,
    variant: str | None,
    out: Path,
    parents: dict[str, str],
    asked: Questions,
    seeds: Sequence[int],
    factors: Sequence[float],
) -> dict[str, Any]:
    """Train and measure what is not there yet. UserError: the study has not ended, values cannot be carried, ..."""
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import load
    from mmtrain.sweep.spec import read_sweep
    from mmtrain.sweep.trial import step_cost
    from tools.transfer import carry

    if load(target).mup.base:
        raise ConfigError(f"{target} names mup.base, so as it stands it is no SP: take the base out of it")
    for arm, parent in parents.items():
        check_parent(arm, parent)
    sweep = read_sweep(sweep_file)
    lines = carry(sweep, target, [f"init_from={parents['mup']}"], out / RECIPE, variant, [])
    origin = json.loads((out / RECIPE).with_suffix(".transfer.json").read_text())
    rows = []
    for one in runs(seeds, factors):
        recipe = recipe_of(one, target, out, origin["values"], parents)
        rows.append({"arm": one.arm, "factor": one.factor, "seed": one.seed, **ended(recipe, asked)})
        print(f"{one.name()}: {rows[-1]}", file=sys.stderr)
    carried = load(out / RECIPE)
    return {
        "bench": "transfer_end_to_end",
        "report": lines,
        "values": origin["values"],
        **costs(sweep, origin["variant"], step_cost(carried).flops * carried.steps),
        "questions": asked.limit,
        "found": summary(rows),
        "runs": rows,
    }


def check_parent(arm: str, parent: str) -> None:
    """ConfigError unless the checkpoint was trained in the parametrisation of its arm."""
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import load
    from mmtrain.run.reader import open_weights
    from mmtrain.run.saver import RECIPE as RECIPE_FILE

    base = load(open_weights(Path(parent)).folder / RECIPE_FILE).mup.base
    if bool(base) != (arm != SP):
        said = "with mup.base, so it is no SP" if base else "without mup.base, in SP"
        raise ConfigError(f"--{arm}-parent {parent} was trained {said}; give a parent of the arm's own parametrisation")


def runs(seeds: Sequence[int], factors: Sequence[float]) -> list[Run]:
    """The transferred values in both parametrisations first, then the rest of the scan."""
    scan = [1.0, *(factor for factor in factors if factor != 1.0)]
    return [
        Run(arm, factor, seed)
        for factor in scan
        for arm in (("mup", SP) if factor == 1.0 else ("mup",))
        for seed in seeds
    ]


def recipe_of(one: Run, target: Path, out: Path, values: dict[str, Any], parents: dict[str, str]) -> "Recipe":
    """The target's recipe for a run: SP's is the target with the values, muP's the one that tools.transfer wrote."""
    from mmtrain.config.load import load

    changes = [f"init_from={parents[one.arm]}", f"seed={one.seed}", f"out={out / one.name()}"]
    if one.arm == SP:
        return load(target, [*(f"{key}={value}" for key, value in values.items()), *changes])
    return load(out / RECIPE, [f"optim.lr={load(out / RECIPE).optim.lr * one.factor}", *changes])


def ended(recipe: "Recipe", asked: Questions) -> dict[str, Any]:
    """Loss and accuracy of a run, trained now if it is not there.

    ConfigError: it was stopped before its end, or what is there was made with other values or questions.
    """
    from mmtrain.config.errors import ConfigError
    from mmtrain.config.load import dump
    from mmtrain.sweep.trial import discard_weights, run_trial

    out = Path(recipe.out)
    made = {"recipe": dump(recipe), "questions": str(asked.file), "limit": asked.limit}
    if not (out / MEASURED).exists():
        outcome = run_trial(recipe, "all", lambda _: False)
        if outcome.ending == "interrupted":
            raise ConfigError(f"{out} was stopped before its end; the same command goes on")
        found = {"lr": recipe.optim.lr, "ending": outcome.ending, "steps": outcome.steps}
        if outcome.ending == "done":
            found |= {"loss": outcome.loss, **answers(out, asked)}
        (out / MEASURED).write_text(json.dumps({"made": made, "found": found}) + "\n")
        discard_weights(out)
    kept = json.loads((out / MEASURED).read_text())
    if differing := [key for key, value in made.items() if kept["made"][key] != value]:
        raise ConfigError(f"{out} was made with another {' and '.join(differing)}; remove it, or give a new --out")
    return kept["found"]


def answers(checkpoint: Path, asked: Questions) -> dict[str, float]:
    """Accuracy over all questions, those with the answers yes and no, and the others."""
    from mmtrain.evaluate.prompts import Prompter
    from mmtrain.evaluate.tasks import Evaluator
    from mmtrain.inference import open_inference

    opened = open_inference(checkpoint)
    prompter = Prompter(opened.recipe, opened.tokenizer, asked.images, False)
    found = Evaluator(prompter, opened.forward, max_new_tokens=8).vqa(asked.file, asked.limit).metrics
    opened.close()
    return {key: value for key, value in found.items() if key.startswith("accuracy")}


def costs(sweep: "Sweep", variant: str, target_flops: float) -> dict[str, Any]:
    """FLOPs of the proxy's trials against those of one run of the target."""
    from mmtrain.sweep.spec import VARIANT
    from mmtrain.sweep.study import Study

    trials = [
        trial for trial in Study(sweep, create=False).trials() if trial.facts and trial.params[VARIANT] == variant
    ]
    tuning = sum(trial.facts["flops"] for trial in trials)
    return {
        "tuning_trials": len(trials),
        "tuning_flops": tuning,
        "target_flops": target_flops,
        "tuning_over_target": tuning / target_flops,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and lowest and highest, of the three: transferred, the scan's best rate, SP."""
    scan: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] != SP:
            scan.setdefault(row["factor"], []).append(row)
    losses = {factor: fmean(row.get("loss", math.inf) for row in at) for factor, at in scan.items()}
    best = min(losses, key=lambda factor: losses[factor])
    above = losses[1.0] - losses[best] if math.isfinite(losses[1.0]) else None
    return {
        "transferred": _over_seeds(scan[1.0]),
        "own_best": {
            "factor": best,
            "interior": min(losses) < best < max(losses),
            **_over_seeds(scan[best]),
        }
        if math.isfinite(losses[best])
        else None,
        "sp": _over_seeds([row for row in rows if row["arm"] == SP]),
        "loss_above_own_best": above,
    }


def _over_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Loss and accuracy of one setting: no mean where a seed diverged, which would flatter it."""
    diverged = sum(row["ending"] != "done" for row in rows)
    found: dict[str, Any] = {"diverged": diverged}
    for key in ("loss", "accuracy"):
        values = [row[key] for row in rows if key in row]
        spread = {"lowest": min(values), "highest": max(values)} if values else None
        found[key] = spread and {"mean": None if diverged else fmean(values), **spread}
    return found


if __name__ == "__main__":
    run(main)
