"""From a proxy's sweep to the recipe of a wider target, with its origin and a report.

    python -m tools.transfer SWEEP.yaml TARGET.yaml --out recipe.yaml [--variant NAME] [key=value ...]

The best point's rates and multipliers hold at the proxy's base widths: the written recipe names these in mup.base, and
the muP rules carry the values to the target. Differences that values do not survive are refused; --accept KEY lets one
pass and says so in the recipe. key=value are values of the target, such as init_from.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console

from mmtrain.config.errors import ConfigError, DataError, UserError
from mmtrain.config.load import load
from mmtrain.config.schema import Recipe
from mmtrain.sweep.spec import VARIANT, Sweep, Value, read_sweep
from mmtrain.sweep.study import Study, Trial
from mmtrain.sweep.transfer import (
    at_edge,
    base_widths,
    best_point,
    differences,
    sanity,
    transferred,
)
from mmtrain.sweep.trial import step_cost

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
    trials = Study(sweep, create=False).trials()
    best = best_point(sweep, trials, variant)
    parent = sweep.parent_of(best.params[VARIANT])
    proxy = sweep.recipe_of(best.params, sweep.out, (f"init_from={parent.out}",) if parent else ())
    target = load(target_file, overrides)
    refused, flagged = differences(proxy, target)
    stop = [difference for difference in refused if difference.key not in accept]
    if stop:
        raise ConfigError(
            f"{target_file} is no wider {sweep.recipe}: tuned values do not survive\n"
            + "\n".join(f"  {difference.words()}" for difference in stop)
            + "\nmake the proxy like the target there, or let a key pass with --accept KEY"
        )
    flagged += [difference for difference in refused if difference.key in accept]
    values, numbers = transferred(best), ", ".join(map(str, best.trials))
    lines = [
        f"origin: {sweep.file}, trials {numbers}, held-out {sweep.objective} loss {best.loss:.4f}"
        + (f" (spread over seeds {best.spread:.4f})" if len(best.trials) > 1 else ""),
        f"transferred by width: {_shown(values)}",
        *(f"not transferred: {key}" for key in sweep.search if key not in (*values, "seed")),
        *(f"flagged: {difference.words()}" for difference in flagged),
        *(f"flagged: {edge}" for edge in at_edge(sweep, best)),
    ]
    written = write_recipe(out, target_file, overrides, proxy, values, lines)
    lines += costs(written, [trial for trial in trials if trial.params.get(VARIANT) == best.params[VARIANT]])
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
        "base": base_widths(proxy),
        "flagged": [difference.words() for difference in flagged],
        "report": lines,
    }
    out.with_suffix(".transfer.json").write_text(json.dumps(origin, indent=1) + "\n")
    return lines


def write_recipe(
    out: Path,
    target_file: Path,
    overrides: Sequence[str],
    proxy: Recipe,
    values: dict[str, Value],
    lines: Sequence[str],
) -> Recipe:
    """A recipe on top of the target's; it is loaded once to see that it can be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    settled = load(target_file, [*overrides, *(f"{key}={value}" for key, value in values.items())])
    mup = {name: value for name, value in asdict(settled.mup).items() if name not in ("base", "lr")}
    mup |= {"lr": dict(settled.mup.lr), "base": base_widths(proxy)}
    body: dict = {
        "base": os.path.relpath(target_file.resolve(), out.parent.resolve()),
        "mup": mup,
        "optim": {"lr": settled.optim.lr, "weight_decay": settled.optim.weight_decay},
    }
    header = "# Written by tools.transfer\n" + "".join(f"# {line}\n" for line in lines)
    extra = "".join(f"# with {item}\n" for item in overrides)
    out.write_text(header + extra + yaml.safe_dump(_with(body, overrides), sort_keys=False))
    return load(out)


def _with(body: dict, overrides: Sequence[str]) -> dict:
    """The recipe's own keys and those of the command line."""
    for item in overrides:
        key, _, value = item.partition("=")
        place = body
        *path, last = key.split(".")
        for name in path:
            place = place.setdefault(name, {})
        place.setdefault(last, yaml.safe_load(value))
    return body


def costs(target: Recipe, trials: list[Trial]) -> list[str]:
    """What tuning took, by the proxy's trials that ended, against what the target takes, and what laws would say."""
    ended = [trial for trial in trials if trial.facts]
    spent = sum(trial.facts["flops"] for trial in ended)
    try:
        cost = step_cost(target)
    except (ConfigError, DataError) as error:
        tokens = float(target.data.global_batch * target.data.sequence_length)
        lines = [f"cost of tuning: {spent:.3g} FLOPs; of the target unknown, its data are not here ({error})"]
    else:
        tokens = cost.tokens
        whole = cost.flops * target.steps
        share = f"{spent / whole:.1%} of the target's {whole:.3g}" if whole else "the target runs by epochs"
        lines = [f"cost of tuning: {spent:.3g} FLOPs in {len(ended)} trials, {share}"]
    return lines + sanity(target, target.optim.lr, tokens, target.steps)


def _shown(values: dict[str, Value]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


if __name__ == "__main__":
    sys.exit(main())
