"""Coordinate check: does width leave what training changes alone? Trains a recipe's model for a few steps at 4 widths.

    python -m tools.coord_check RECIPE.yaml [key=value ...]     # muP must pass, SP must fail
    python -m tools.coord_check RECIPE.yaml --faults            # and every seeded fault must be caught

The base widths (the recipe's, or those of its mup.base) are multiplied by --widths in all parts at once. --grow says
what a wider attention has more of: size of each head, or heads (then key and value heads stay, and their projections
go into a fixed width). The batch is drawn, the same for all steps and widths: data.micro_batch packs of random pictures
and text through the whole model. A probe of muP passes when slope +- 2 standard errors lies within the limits, so noise
speaks against it: take more --seeds or packs for a smaller error, or a wider base. SP and faults run with the same
settings, and must lie outside for certain. Writes coord_check.json and coord_check.png to --out. Exit code 0 when
everything is as it must be, else 1.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmtrain.config.errors import ConfigError, UserError
from mmtrain.config.load import load
from mmtrain.config.schema import PARTS, Recipe
from mmtrain.mup.coord import LOGITS, Verdict, judge, lacking
from mmtrain.mup.scales import base_model_config
from tools.bench.record import commit, hardware
from tools.coord_model import FAULTS, Change, Grow, Setup, mup, plain_attention, standard, train


class Finding(NamedTuple):
    """What the check says of one parametrisation."""

    name: str
    verdicts: list[Verdict]
    sizes: dict[str, dict[float, list[float]]]
    formulas: list[str]
    """Factors of the forward that are not muP's, as measured in it."""

    def problems(self) -> list[str]:
        """Everything that speaks against it; empty when it passes."""
        return [f"{v.probe}: {v.problem}" for v in self.verdicts if v.problem] + self.formulas

    def wrong(self) -> bool:
        """Whether it is wrong for certain, and not only unproven."""
        return any(verdict.outside for verdict in self.verdicts) or bool(self.formulas)


def examine(
    name: str, setups: Sequence[Setup], seeds: int, steps: int, told: Callable[[str], None] = lambda _: None
) -> Finding:
    """Train every width with every seed and judge each probe."""
    sizes: dict[str, dict[float, list[float]]] = {}
    formulas: dict[str, None] = {}
    for made in setups:
        width = made.recipe.model.decoder.hidden_size
        for seed in range(seeds):
            told(f"{name}: width {width}, seed {seed}")
            found, wrong = train(made, seed, steps)
            formulas.update(dict.fromkeys(wrong))
            for probe, size in found.items():
                sizes.setdefault(probe, {}).setdefault(width, []).append(size)
    return Finding(name, judge(sizes), sizes, list(formulas))


def check(
    recipe: Recipe,
    factors: Sequence[int],
    seeds: int,
    steps: int,
    grow: Grow,
    faults: Sequence[Change],
    told: Callable[[str], None] = lambda _: None,
) -> tuple[list[Finding], list[str]]:
    """Findings for muP, SP and each fault, all with the same settings, and why the check fails; nothing when it passes.

    The fault of the attention's scale can show only where heads grow in size.
    """
    base = base_model_config(recipe.model, recipe.mup.base)
    setups = [mup(recipe, base, factor, grow) for factor in factors]
    counts = [sum(math.prod(entry.shape) for entry in made.registry.entries.values()) for made in setups]
    if grow == "heads":
        faults = [fault for fault in faults if fault is not plain_attention]
    planted = {"SP": standard, **{fault.__name__: fault for fault in faults}}
    found = [examine("muP", setups, seeds, steps, told)]
    for name, change in planted.items():
        found.append(examine(name, [change(made) for made in setups], seeds, steps, told))
    problems = lacking([made.recipe.model.decoder.hidden_size for made in setups], seeds, steps, counts)
    problems += [f"muP: {problem}" for problem in found[0].problems()]
    if not any(verdict.outside for verdict in found[1].verdicts):
        problems.append("SP passes too: these settings cannot tell right from wrong; take a higher optim.lr")
    problems += [f"{other.name} was not caught" for other in found[2:] if not other.wrong()]
    return found, problems


def show(findings: Sequence[Finding], problems: Sequence[str], console: Console) -> None:
    """Slopes of every probe under every parametrisation, and the verdict."""
    table = Table("probe", *(f.name for f in findings), title="slope of log2 change over log2 width ± SE", box=None)
    for number, verdict in enumerate(findings[0].verdicts):
        table.add_row(verdict.probe, *(_cell(f.verdicts[number]) for f in findings))
    table.add_row("wrong factors in the forward", *(str(len(f.formulas)) for f in findings))
    console.width = max(console.width, 40 + 20 * len(findings))
    console.print(table)
    for problem in problems:
        console.print(f"FAIL {problem}", markup=False, highlight=False, soft_wrap=True)
    console.print("coordinate check: " + ("FAIL" if problems else "pass"))


def _cell(verdict: Verdict) -> str:
    return f"{verdict.fit.slope:+.2f} ± {verdict.fit.error:.2f}" + (" *" if verdict.problem else "")


def write(
    findings: Sequence[Finding], problems: Sequence[str], settings: dict[str, Any], out: Path
) -> tuple[Path, Path]:
    """coord_check.json and coord_check.png."""
    out.mkdir(parents=True, exist_ok=True)
    report = {
        **settings,
        "pass": not problems,
        "problems": list(problems),
        "findings": {
            finding.name: {
                "probes": {verdict.probe: _kept(verdict, finding.sizes[verdict.probe]) for verdict in finding.verdicts},
                "wrong_factors": finding.formulas,
            }
            for finding in findings
        },
    }
    path = out / "coord_check.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path, plot(findings, out / "coord_check.png")


def _kept(verdict: Verdict, sizes: dict[float, list[float]]) -> dict[str, Any]:
    """A verdict as plain values, with the change by width: the geometric mean over seeds."""
    numbers = {key: round(value, 4) for key, value in verdict.fit._asdict().items()}
    change = {width: float(f"{_middle(values):.4g}") for width, values in sizes.items()}
    return asdict(verdict) | {"fit": numbers, "change": change}


def _middle(values: Sequence[float]) -> float:
    """Geometric mean."""
    return float(Tensor(values).log2().mean().exp2())


def plot(findings: Sequence[Finding], path: Path) -> Path:
    """Change over width, a column for each parametrisation, a row for each part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(findings), 9.0), layout="constrained")
    axes = figure.subplots(len(PARTS), len(findings), squeeze=False, sharey="row", sharex=True)
    for column, finding in enumerate(findings):
        for row, part in enumerate(PARTS):
            axis = axes[row][column]
            for verdict in (verdict for verdict in finding.verdicts if verdict.part == part):
                sizes = finding.sizes[verdict.probe]
                style = {"color": "tab:red"} if verdict.problem else {"color": "tab:blue", "alpha": 0.6}
                dashed = "--" if verdict.kind in LOGITS else "-"
                axis.plot(list(sizes), list(map(_middle, sizes.values())), dashed, marker=".", **style)
            axis.set(xscale="log", yscale="log", title=f"{finding.name}: {part}" if row == 0 else part)
            axis.set_xscale("log", base=2)
    figure.supxlabel("decoder width (red: outside the limits; dashed: logits, which may shrink)")
    figure.supylabel("RMS change of the activation after training")
    FigureCanvasAgg(figure).print_png(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8], help="factors on the base widths")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--grow", choices=["head_size", "heads"], default="head_size")
    parser.add_argument("--faults", action="store_true", help="also plant faults, which must be caught")
    parser.add_argument("--out", type=Path, default=Path("runs/coord_check"))
    args = parser.parse_intermixed_args(argv)
    console, started = Console(), time.monotonic()
    try:
        recipe = load(args.recipe, args.overrides)
        if not all(getattr(recipe.model, part).moe.num_experts for part in PARTS):
            console.print("note: not all parts have experts; their routers are not checked")
        if min(args.widths) < 1 or min(args.seeds, args.steps) < 1:
            raise ConfigError("--widths, --seeds and --steps are at least 1")
        faults = FAULTS if args.faults else ()
        with console.status("") as status:
            findings, problems = check(recipe, args.widths, args.seeds, args.steps, args.grow, faults, status.update)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    command = shlex.join(["python", "-m", "tools.coord_check", *(sys.argv[1:] if argv is None else argv)])
    settings = {
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "recipe": str(args.recipe),
        "overrides": args.overrides,
        "grow": args.grow,
        "lr": recipe.optim.lr,
        "packs": recipe.data.micro_batch,
    }
    settings |= {"widths": args.widths, "seeds": args.seeds, "steps": args.steps}
    settings["seconds"] = round(time.monotonic() - started, 1)
    show(findings, problems, console)
    for path in write(findings, problems, settings, args.out):
        console.print(str(path))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
