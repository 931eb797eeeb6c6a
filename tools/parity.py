"""Trains the tiny recipe on many layouts and prints how far each is from plain PyTorch in one process.

    python -m tools.parity                              the covering part that the test suite runs
    python -m tools.parity --all --out parity.jsonl     every layout of 1, 2, 3, 4, 6 and 8 ranks; resumable
    python -m tools.parity --layouts 2.1.2.1 4.3.1.1    world.stage.tensor.expert, with AdamW and SGD
    python -m tools.parity --checkpoints                every layout's checkpoint goes on under every other layout
    python -m tools.parity --bf16                       200 steps in bf16 beside the same in fp32
    deepspeed --module tools.parity RECIPE.yaml         the layout of a recipe on the ranks of this job, before a long
                                                        run; also under torchrun and srun

The largest difference of a case counts loss, its terms (language loss by source, router losses by part), gradient norm
(whole and by part), and every parameter and Adam moment after every step. Exit code 1 when one exceeds 1e-5. Without a
recipe the ranks are processes of this machine that talk over gloo.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from launch.entry import run, setup
from mmtrain.config.errors import ConfigError
from mmtrain.config.load import load, without_launcher_flags
from tests import dist
from tests.parallel import compare, crossing, job, matrix, precision
from tests.parallel.matrix import STEPS, Case, Line

KINDS = ("loss", "term", "norm", "part_norm", "param", "exp_avg", "exp_avg_sq")


def main() -> int:
    """0 when every layout is equal or refused, 1 otherwise."""
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="take the layout from its `parallel` section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--all", action="store_true", help="every layout, not the covering part")
    parser.add_argument("--layouts", nargs="+", default=[], metavar="WORLD.STAGE.TENSOR.EXPERT")
    parser.add_argument("--out", type=Path, help="a line of JSON for each case; cases that it holds are not run again")
    parser.add_argument("--checkpoints", action="store_true", help="save under one layout, load under another")
    parser.add_argument("--bf16", action="store_true", help="losses in bf16 beside those in fp32")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each rank instead of a fork")
    arguments = parser.parse_intermixed_args(without_launcher_flags(sys.argv[1:]))
    if arguments.recipe:
        return job.compare_layout(load(arguments.recipe, arguments.overrides).parallel)
    if arguments.checkpoints:
        return checkpoints()
    if arguments.bf16:
        return bf16()
    cases = chosen(arguments.all, arguments.layouts)
    lines = read(arguments.out)
    left = [case for case in cases if str(case) not in lines]
    if len(left) < len(cases):
        print(f"{len(cases) - len(left)} of {len(cases)} cases are in {arguments.out}")
    with tempfile.TemporaryDirectory() as folder:
        for line in matrix.run(left, Path(folder), arguments.fresh):
            if not line.refused:
                print(describe(line), flush=True)
            lines[str(line.case)] = as_json(line)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(as_json(line)) + "\n")
    return summarise([lines[str(case)] for case in cases])


def checkpoints() -> int:
    """All ordered pairs of layouts."""
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        for pair, largest, row in crossing.run(crossing.all_pairs(), Path(folder)):
            differences[pair] = largest
            print(f"{pair}: {largest:.1e}" + ("" if largest <= compare.TOLERANCE else f"\n{row}"), flush=True)
    failed = [str(pair) for pair, largest in differences.items() if not largest <= compare.TOLERANCE]
    print(
        f"{len(differences)} ordered pairs, {crossing.STEPS} steps after loading, largest difference "
        f"{max(differences.values()):.1e}, {len(failed)} failed: {failed}"
    )
    return int(bool(failed))


def bf16() -> int:
    """Losses of 200 steps, windows of 10."""
    fp32, low = (dist.run(precision.losses, 1, name)[0] for name in ("fp32", "bf16"))
    windows = [precision.window_means(values) for values in (fp32, low)]
    largest = max(abs(found / wanted - 1) for wanted, found in zip(*windows, strict=True))
    print(
        f"{len(fp32)} steps, loss in windows of {precision.WINDOW}: fp32 {windows[0][0]:.3f} -> {windows[0][-1]:.3f}, "
        f"bf16 {windows[1][0]:.3f} -> {windows[1][-1]:.3f}; largest difference of a window {largest:.2%}"
    )
    return int(largest > precision.TOLERANCE)


def chosen(everything: bool, layouts: Iterable[str]) -> list[Case]:
    """The cases that the command asks for. ConfigError on a layout that is none."""
    if not layouts:
        return matrix.full() if everything else matrix.covering()
    found = []
    for layout in layouts:
        numbers = layout.split(".")
        if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
            raise ConfigError(f"--layouts {layout}: four numbers are needed, world.stage.tensor.expert, as in 2.1.2.1")
        cases = [case for case in matrix.full() if case[:4] == tuple(map(int, numbers))]
        if not cases:
            raise ConfigError(
                f"--layouts {layout}: no such layout; world is one of {sorted(matrix.GLOBAL_BATCH)}, stage 0 to 3, "
                "tensor and expert 1, 2 or 4 with a product that divides the world"
            )
        found += cases
    return found


def read(path: Path | None) -> dict[str, dict]:
    """Case -> its line, from an earlier start of the command."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {line["case"]: line for line in lines}


def as_json(line: Line) -> dict:
    """A line of the file."""
    return {
        "case": str(line.case),
        "passes": line.passes(),
        "refused": line.refused,
        "error": line.error,
        "largest": line.largest,
        "where": line.where,
        "ties": line.ties,
    }


def describe(line: Line) -> str:
    """A line for the terminal, of a case that was run."""
    if line.error:
        return f"{line.case}: FAILED\n{line.error}"
    beyond = {kind: value for kind, value in line.largest.items() if not value <= compare.TOLERANCE}
    names = "".join(f"  {kind} {value:.1e} {line.where[kind]}" for kind, value in beyond.items())
    ties = f"  {line.ties} other choices of experts" if line.ties else ""
    return f"{line.case}: {'equal' if line.passes() else 'DIFFERENT'}  {max(line.largest.values()):.1e}{names}{ties}"


def summarise(lines: list[dict]) -> int:
    """The table at the end; the exit code."""
    refused = [line for line in lines if line["refused"]]
    failed = [line["case"] for line in lines if not line["passes"]]
    measured = [line for line in lines if line["largest"]]
    floor = noise_floor()
    print(f"\n{len(measured)} cases measured over {STEPS} steps, {len(refused)} refused, {len(failed)} failed")
    print(f"{'largest difference of':24}{'all cases':>12}{'one process, batch cut in 4':>30}")
    for kind in KINDS:
        values = [line["largest"][kind] for line in measured if kind in line["largest"]]
        if values:
            print(f"{kind:24}{max(values):12.1e}{floor[kind]:30.1e}")
    print(f"other choices of experts: {sum(line['ties'] for line in measured)}")
    for reason in sorted({line["refused"] for line in refused}):
        print(f"refused: {reason}")
    if failed:
        print("failed: " + " ".join(failed))
    return int(bool(failed))


def noise_floor() -> dict[str, float]:
    """How far plain PyTorch in fp32 is from itself when it runs its batch in 4 parts."""
    recipe = Case(1, 1, 1, 1, 1, "adamw", True, False).recipe()
    whole, cut = (compare.reference_run(recipe, STEPS, torch.float32, cuts) for cuts in (1, 4))
    return matrix.measure(Case(1, 1, 1, 1, 4, "adamw", True, False), cut, whole).largest


if __name__ == "__main__":
    run(main)
