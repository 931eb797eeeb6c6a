"""From a proxy's sweep to the recipe of a wider target, with its origin and a report.

    python -m tools.transfer SWEEP.yaml TARGET.yaml --out recipe.yaml [--variant NAME] [key=value ...]

The best point's rates and multipliers hold at the proxy's base widths: the written recipe names these in mup.base, and
the muP rules carry the values to the target. Differences that values do not survive are refused; --accept KEY lets one
pass and says so in the recipe. key=value are values of the target, such as init_from; what is carried cannot be among
them. A target that starts from weights needs parents that were trained at the same base: training refuses others.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mmtrain.config.check import check_model
from mmtrain.config.errors import ConfigError, DataError, UserError
from mmtrain.config.load import COMMAND_LINE, load, load_with_origins
from mmtrain.config.schema import Recipe
from mmtrain.mup.scales import base_model_config
from mmtrain.sweep.spec import VARIANT, Sweep, Value, read_sweep
from mmtrain.sweep.study import Study, Trial
from mmtrain.sweep.transfer import (
    at_edge,
    best_point,
    carried_base,
    differences,
    horizon,
    sanity,
    transferred,
    unfinished,
)
from mmtrain.sweep.trial import Cost, step_cost

HEADER = "# Written by tools.transfer\n"
CHECKED = (0.5, 1.0, 2.0)
"""Factors on the transferred rate that a person should try at the target."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="recipe to write; the report goes beside it")
    parser.add_argument("--variant", help="which of the sweep's variants is the proxy")
    parser.add_argument("--accept", nargs="+", default=[], metavar="KEY", help="differences to let pass")
    args = parser.parse_intermixed_args(argv)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        sweep = read_sweep(args.sweep)
        report = carry(sweep, args.target, args.overrides, args.out, args.variant, args.accept)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    for line in report:
        console.print(line)
    return 0


def carry(
    sweep: Sweep, target_file: Path, overrides: Sequence[str], out: Path, variant: str | None, accept: Sequence[str]
) -> list[str]:
    """Write the recipe to `out` and the report beside it; returns the report's lines. UserError where it cannot be."""
    _check_place(out, target_file)
    trials = Study(sweep, create=False).trials()
    best = best_point(sweep, trials, variant)
    parent = sweep.parent_of(best.params[VARIANT])
    proxy = sweep.recipe_of(best.params, sweep.out, (f"init_from={parent.out}",) if parent else ())
    target, origins = load_with_origins(target_file, overrides)
    values = transferred(best, proxy, target)
    base = carried_base(proxy, target)
    _check_free(target_file, target, [key for key, layer in origins.items() if layer == COMMAND_LINE], values, base)
    refused, flagged = differences(proxy, target)
    stop = [difference for difference in refused if difference.key not in accept]
    if stop:
        raise ConfigError(
            f"{target_file} is no wider {sweep.recipe}: tuned values do not survive\n"
            + "\n".join(f"  {difference.words()}" for difference in stop)
            + "\nmake the proxy like the target there, or let a key pass with --accept KEY"
        )
    flagged += [difference for difference in refused if difference.key in accept]
    flagged = [difference for difference in flagged if difference.key not in values]
    cost, unknown = _cost(target)
    facts = next(trial.facts for trial in trials if trial.number == best.trials[0])
    flagged += [longer] if (longer := horizon(facts, target, cost.tokens)) else []
    numbers, waiting = ", ".join(map(str, best.trials)), unfinished(sweep, trials)
    lines = [
        f"origin: {sweep.file}, trials {numbers}, held-out {sweep.objective} loss {best.loss:.4f}"
        + (f" (spread over seeds {best.spread:.4f})" if len(best.trials) > 1 else ""),
        f"transferred by width: {_shown({key: value for key, value in values.items() if key in best.params})}",
        *(f"carried though not searched: {key}={values[key]}" for key in values if key not in best.params),
        *(f"not transferred: {key}" for key in sweep.search if key not in (*values, "seed")),
        *(f"flagged: {difference.words()}" for difference in flagged),
        *(f"flagged: {edge}" for edge in at_edge(sweep, best)),
        *(
            f"flagged: trial {number} has a lower loss, {loss:.4f}, with fewer seeds; it may be luck: repeat it"
            for number, loss in best.passed_over
        ),
        *([f"flagged: the study has not ended: {waiting}"] if waiting else []),
    ]
    written = write_recipe(out, target_file, overrides, base, values, lines)
    spent = [trial for trial in trials if trial.params.get(VARIANT) == best.params[VARIANT] and trial.facts]
    lines += costs(written, spent, sweep.parent is not None, cost, unknown)
    lr = written.optim.lr
    lines.append(
        "check at the target, a short run each: " + ", ".join(f"optim.lr={lr * factor:.4g}" for factor in CHECKED)
    )
    origin = {
        "sweep": str(sweep.file),
        "trials": best.trials,
        "variant": best.params[VARIANT],
        "loss": best.loss,
        "values": values,
        "base": base,
        "flagged": [difference.words() for difference in flagged],
        "report": lines,
    }
    beside = out.with_suffix(".transfer.json")
    _draft(beside).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    _draft(beside).replace(beside)
    return lines


def _check_place(out: Path, target_file: Path) -> None:
    """ConfigError unless `out` is free, or an earlier recipe of this tool that is not the target."""
    if out.exists() and (out.samefile(target_file) or not out.read_text(encoding="utf-8").startswith(HEADER)):
        what = "is the target itself" if out.samefile(target_file) else "is there, and this tool did not write it"
        raise ConfigError(f"--out {out} {what}; it would be lost: choose another name")


def _check_free(
    target_file: Path, target: Recipe, given: Iterable[str], values: Mapping[str, Value], base: Mapping[str, Any]
) -> None:
    """ConfigError where the command line gives what is carried, or the target names another base."""
    if taken := [key for key in given if key in (*values, "optim.lr") or key.startswith("mup.")]:
        raise ConfigError(
            f"{', '.join(taken)}: carried from the sweep, not given here; leave it out, and change it when the written "
            "recipe is trained"
        )
    own = target.mup.base
    if other := [
        f"{part}.{key}" for part in base for key in own.get(part, {}) if own[part][key] != base[part].get(key)
    ]:
        raise ConfigError(
            f"{target_file} names mup.base already, and {', '.join(other)} otherwise than the proxy, at whose widths "
            f"the values hold ({json.dumps(base)}); take it out of the target"
        )


def write_recipe(
    out: Path,
    target_file: Path,
    overrides: Sequence[str],
    base: Mapping[str, Mapping[str, int]],
    values: Mapping[str, Value],
    lines: Sequence[str],
) -> Recipe:
    """A recipe on top of the target's. ConfigError, and no file: it could not be trained."""
    out.parent.mkdir(parents=True, exist_ok=True)
    settled = load(target_file, [*overrides, *(f"{key}={value}" for key, value in values.items())])
    mup = {name: value for name, value in asdict(settled.mup).items() if name not in ("base", "lr")}
    mup |= {"lr": dict(settled.mup.lr), "base": base}
    body: dict = {
        "base": os.path.relpath(target_file.resolve(), out.parent.resolve()),
        "mup": mup,
        "optim": {"lr": settled.optim.lr, "weight_decay": settled.optim.weight_decay},
    }
    for item in overrides:
        key, _, value = item.partition("=")
        tree = yaml.safe_load(value.strip() or '""')
        for name in reversed(key.split(".")):
            tree = {name: tree}
        _merge(body, tree)
    header = HEADER + "".join(f"# {line}\n" for line in lines) + "".join(f"# with {item}\n" for item in overrides)
    draft = _draft(out)
    try:
        draft.write_text(header + yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
        recipe = load(draft)
        check_model(replace(recipe, init_from=recipe.init_from or "named when it is trained"))
        base_model_config(recipe.model, recipe.mup.base)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return recipe


def _draft(path: Path) -> Path:
    """Where a file is written before it gets its name: others may read that meanwhile."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def _merge(into: dict[str, Any], tree: Mapping[str, Any]) -> None:
    """Set a tree's values, and leave the others."""
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _cost(target: Recipe) -> tuple[Cost, str]:
    """What a step of the target takes; where its data are not here, at most so many tokens, and why."""
    try:
        return step_cost(target), ""
    except (ConfigError, DataError) as error:
        return Cost(float(target.data.global_batch * target.data.sequence_length), math.nan), str(error)


def costs(target: Recipe, trials: Sequence[Trial], parents: bool, cost: Cost, unknown: str) -> list[str]:
    """What tuning took, by the proxy's trials that ended, against what the target takes, and what laws would say."""
    spent, whole = sum(trial.facts["flops"] for trial in trials), cost.flops * target.steps
    share = f"{spent / whole:.1%} of the target's {whole:.3g}" if whole else "the target runs by epochs"
    if unknown:
        share = f"of the target unknown, its data are not here ({unknown})"
    left_out = " (their parent's left out)" if parents else ""
    line = f"cost of tuning: {spent:.3g} FLOPs in {len(trials)} trials{left_out}, {share}"
    return [line, *sanity(target, target.optim.lr, cost.tokens, target.steps)]


def _shown(values: dict[str, Value]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


if __name__ == "__main__":
    sys.exit(main())
