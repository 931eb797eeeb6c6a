"""Run a chain of stages, each from its newest checkpoint: run the same command again after any interruption.

    python launch/stages.py RECIPES... [key=value ...] [--ranks N | --launcher COMMAND]

A stage that has done all its steps ends at once, so the chain goes on where it stopped. `key=value` holds for all.
Recipes, tokenizers and shards of all stages are checked before the first one starts.
--ranks N        processes on this machine (default: one a GPU, else 1), started by deepspeed
--launcher TEXT  anything else that starts the ranks of one stage, e.g. "srun python", "torchrun --nproc-per-node 8",
                 "deepspeed --hostfile hosts"
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.entry import positive, run, setup

TRAIN = Path(__file__).resolve().with_name("train.py")


def main() -> int:
    setup()
    from mmtrain.config.load import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE | key=value")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=positive, default=0, help="processes on this machine")
    where.add_argument("--launcher", default="", help="command that starts the ranks of one stage")
    options = parser.parse_intermixed_args()
    overrides = [argument for argument in options.arguments if "=" in argument]
    recipes = [argument for argument in options.arguments if "=" not in argument]
    ranks = None if options.launcher else ranks_here(options.ranks)
    check_chain(recipes, [load(recipe, overrides) for recipe in recipes], ranks)
    for number, recipe in enumerate(recipes, 1):
        print(f"== stage {number} of {len(recipes)}: {recipe}", flush=True)
        if code := run_stage([*start(options.ranks, options.launcher), str(TRAIN), recipe, *overrides]):
            print(f"stage {number} ({recipe}) ended with code {code}; the same command goes on from there", flush=True)
            return code
    return 0


def check_chain(paths: Sequence[str], recipes: Sequence, ranks: int | None) -> None:
    """Raise UserError, before anything starts, where a stage cannot run or does not go on from the one before it.

    ranks: processes of each stage; None where the launcher decides.
    """
    from mmtrain.config.errors import ConfigError
    from mmtrain.preflight import preflight

    if not recipes:
        raise ConfigError("no recipe given: python launch/stages.py RECIPES... [key=value ...]")
    for earlier, later, path in zip(recipes, recipes[1:], paths[1:], strict=False):
        if Path(later.init_from) != Path(earlier.out) and Path(earlier.out) not in Path(later.init_from).parents:
            raise ConfigError(
                f"{path}: init_from={later.init_from or '(nothing)'}, but the stage before it writes to {earlier.out}; "
                f"set init_from: {earlier.out}, or run the stages one by one with launch/train.py"
            )
        if later.out == earlier.out:
            raise ConfigError(f"{path}: out={later.out} is also the folder of the stage before it; give each its own")
    for recipe in recipes:
        preflight(recipe, ranks)


def start(ranks: int, launcher: str) -> list[str]:
    """The words before launch/train.py."""
    if launcher:
        return shlex.split(launcher)
    from mmtrain.parallel.environment import free_port

    # The console script lies beside the interpreter; a virtual environment need not be active.
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(deepspeed), "--num_gpus", str(ranks_here(ranks)), "--master_port", str(free_port())]


def ranks_here(asked: int) -> int:
    """Processes of a stage that deepspeed starts on this machine: as asked, or else one a GPU, or else 1."""
    import torch

    return asked or max(1, torch.cuda.device_count())


def run_stage(command: Sequence[str]) -> int:
    """Run one stage; SIGTERM and SIGUSR1 reach its ranks, which save and end. Returns its exit code."""
    import os

    import torch

    environment = {**os.environ}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {number: signal.signal(number, lambda got, _: tell_ranks(process.pid, got)) for number in SIGNALS}
    try:
        return process.wait()
    except KeyboardInterrupt:
        tell_ranks(process.pid, signal.SIGTERM)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def tell_ranks(launcher: int, number: int) -> None:
    """Signal every rank under `launcher`. The launcher itself would end its ranks one after another, without saving."""
    import psutil

    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if "RANK" in child.environ() and str(TRAIN) in child.cmdline():  # not what a rank has started
                child.send_signal(number)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


if __name__ == "__main__":
    run(main)
