"""A chain of stages, with what it took: losses, tokens/s, and the peak memory of all its processes together.

    python -m tools.bench.stages RECIPES... [key=value ...] [--ranks N] [--save NAME]

Runs launch/stages.py recipe by recipe and adds up, ten times a second, the memory of every process that it starts:
launcher, ranks, readers; what each has to itself, and pages of files, which they share, once. What a stage took lies in
OUT/measured.json, and of one that was interrupted, the memory so far: the same command goes on. Prints one JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from launch.entry import positive, run, setup
from tools.bench.record import ROOT, tell

INTERVAL = 0.1  # seconds between two looks
MEASURED = "measured.json"


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE | key=value")
    parser.add_argument("--ranks", type=positive, default=2, help="processes of each stage")
    parser.add_argument("--save", default="", metavar="NAME", help="keep the line as results/NAME.json too")
    options = parser.parse_intermixed_args()
    from mmtrain.config.errors import DataError
    from mmtrain.config.load import load

    recipes = [argument for argument in options.arguments if "=" not in argument]
    overrides = [argument for argument in options.arguments if "=" in argument]
    stages = []
    for recipe in recipes:
        out = Path(load(recipe, overrides).out)
        command = [sys.executable, str(ROOT / "launch/stages.py"), recipe, *overrides, "--ranks", str(options.ranks)]
        seen = json.loads((out / MEASURED).read_text()) if (out / MEASURED).exists() else {}
        if "steps" not in seen:
            seen, code = peak_memory(command, seen)
            out.mkdir(parents=True, exist_ok=True)
            (out / MEASURED).write_text(json.dumps({**({} if code else what(out)), **seen}) + "\n")
            if code:
                raise DataError(f"{recipe} ended with code {code}; run the same command again")
        stages.append({"recipe": recipe, **json.loads((out / MEASURED).read_text())})
    tell({"bench": options.save or "stages", "ranks": options.ranks, "stages": stages}, save=bool(options.save))
    return 0


def peak_memory(command: list[str], before: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Run `command`; (highest memory of all its processes together, or what was seen `before` if that is more; its exit
    code)."""
    process = psutil.Popen(command, stdout=sys.stderr)
    peak, most = 0, 0
    while process.poll() is None:
        time.sleep(INTERVAL)
        looks = [look for look in map(resident, family(process)) if any(look)]
        total = sum(own for own, _ in looks) + max((files for _, files in looks), default=0)
        peak, most = max(peak, total), max(most, len(looks))
    seen = {"peak_gib_all_processes": round(peak / 2**30, 2), "processes": most}
    return {key: max(value, before.get(key, 0)) for key, value in seen.items()}, process.returncode


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and all that it has started; none when it has just ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> tuple[int, int]:
    """Bytes in memory that the process has to itself, and those of files or shared; 0 for one that has just ended."""
    try:
        info = process.memory_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0, 0
    return info.rss - info.shared, info.shared


def what(out: Path) -> dict[str, Any]:
    """What a stage that ended has left in its folder."""
    from mmtrain.run.metrics import read_metrics
    from mmtrain.run.report import NAME

    report = json.loads((out / NAME).read_text())
    lines = read_metrics(out / "metrics.jsonl")
    rates = sorted(line["tokens_per_second"] for line in lines[1:])  # the first holds what starts once
    return {
        "steps": report["steps"],
        "parameters": report["parameters"],
        "language_loss": {line["step"]: round(line["language_loss"], 4) for line in lines},
        "tokens": report["tokens"],
        "tokens_per_second": round(rates[len(rates) // 2], 1) if rates else None,
        "seconds": round(report["timings"]["total_seconds"], 1),
        "peak_gib_largest_rank": round(report["peak_memory_gib"], 2),
    }


if __name__ == "__main__":
    run(main)
