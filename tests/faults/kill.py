"""SIGKILL a real stage between two checkpoints and during a save; its curve must be that of an undisturbed run.

    python -m tests.faults.kill RECIPE --control RUN_FOLDER --out DIR [--ranks N] [key=value ...]

RUN_FOLDER is a finished, undisturbed run of the recipe with the same overrides (without --control, one is made first,
in DIR/control). The stage is started by launch/stages.py, as a user starts it, with out=DIR/killed; all its processes
are killed halfway between the first and the second checkpoint, the command is started again and killed while a
checkpoint is being written, and started again to its end. Compares every line of metrics.jsonl, times excepted, to the
bit. Exit code 1 when any differs.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mmtrain.config.load import load
from mmtrain.config.schema import Recipe
from mmtrain.run.metrics import NAME, PHASES, Rates, read_metrics
from mmtrain.run.retain import committed, step_folder

ROOT = Path(__file__).resolve().parents[2]


def start(recipe: str, overrides: list[str], out: Path, ranks: int) -> subprocess.Popen:
    """The command of a user."""
    command = [sys.executable, "launch/stages.py", recipe, *overrides, f"out={out}", "--ranks", str(ranks)]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def kill(job: subprocess.Popen) -> None:
    """SIGKILL to the launcher and everything below it."""
    family = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    psutil.wait_procs(family, timeout=10)


def reached(out: Path) -> int:
    """The last logged step."""
    try:
        return read_metrics(out / NAME)[-1]["step"]
    except (OSError, IndexError, json.JSONDecodeError):
        return 0


def alive(job: subprocess.Popen) -> bool:
    """Whether the job still runs; SystemExit where it ended before it could be killed."""
    if job.poll() is not None:
        raise SystemExit(f"the run ended with code {job.returncode} before it could be killed; see its log")
    return True


def killed(recipe: str, overrides: list[str], out: Path, ranks: int, every: int) -> None:
    """Both kills."""
    job = start(recipe, overrides, out, ranks)
    while alive(job) and reached(out) < every + every // 2:
        time.sleep(0.02)
    kill(job)
    print(f"killed after step {reached(out)}, between checkpoints: {_left(out)}", flush=True)
    job = start(recipe, overrides, out, ranks)
    target = step_folder(out, 2 * every)
    while alive(job) and not (target.with_suffix(".tmp").exists() or target.exists()):
        time.sleep(0.0005)
    kill(job)
    print(f"killed during the save of step {2 * every}: {_left(out)}", flush=True)
    if code := start(recipe, overrides, out, ranks).wait():
        raise SystemExit(f"the run that went on ended with code {code}; see {out.with_suffix('.log')}")


def _left(out: Path) -> str:
    return ", ".join(sorted(path.name for path in out.glob("step_*"))) or "no checkpoint"


def curve(out: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics without what a clock or the memory says."""
    drop = {*Rates.__dataclass_fields__, *PHASES}
    return [{key: value for key, value in line.items() if key not in drop} for line in read_metrics(out / NAME)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--control", type=Path, help="run folder of an undisturbed run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_intermixed_args()
    recipe: Recipe = load(Path(arguments.recipe), arguments.overrides)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if committed(out / "killed"):
        raise SystemExit(f"{out / 'killed'} has checkpoints already; give another --out")
    control = arguments.control
    if control is None:
        control = out / "control"
        if code := start(arguments.recipe, arguments.overrides, control, arguments.ranks).wait():
            raise SystemExit(f"the undisturbed run ended with code {code}; see {control.with_suffix('.log')}")
    killed(arguments.recipe, arguments.overrides, out / "killed", arguments.ranks, recipe.checkpoint.every)
    ours, theirs = curve(out / "killed"), curve(control)
    different = [line["step"] for line, other in zip(ours, theirs, strict=False) if line != other]
    same = not different and len(ours) == len(theirs)
    print(
        f"{len(ours)} logged steps against {len(theirs)}: " + ("equal to the bit" if same else f"differ: {different}")
    )
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
