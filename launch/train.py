"""Train one stage.

deepspeed launch/train.py RECIPE.yaml [key=value ...]        also by torchrun, or srun python
python launch/train.py RECIPE.yaml [key=value ...]           one process
python launch/train.py RECIPE.yaml --print                   the resolved recipe, and where each value comes from
python launch/train.py RECIPE.yaml --check                   every check and one step of data, no training
python launch/train.py RECIPE.yaml --check --ranks 64        what can be checked for 64 ranks without any of them
python launch/train.py RECIPE.yaml --profile 3:5             and a profiler trace of steps 3 to 5
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launchers start this file from anywhere

from launch.entry import positive, run, setup

if TYPE_CHECKING:
    from mmtrain.config.schema import Recipe


def main() -> int:
    setup()
    from mmtrain.config.load import load_with_origins, show, without_launcher_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--print", action="store_true", dest="show", help="show the resolved recipe and stop")
    parser.add_argument("--check", action="store_true", help="check everything, read one step of data and stop")
    parser.add_argument("--ranks", type=positive, help="with --check: for so many ranks, which are not started")
    parser.add_argument("--profile", default="", metavar="FIRST:LAST", help="steps to trace")
    arguments = parser.parse_intermixed_args(without_launcher_flags(sys.argv[1:]))
    recipe, origins = load_with_origins(arguments.recipe, arguments.overrides)
    if arguments.show:
        print(show(recipe, origins))
        return 0
    if arguments.ranks:
        return check_for(recipe, arguments.ranks, arguments.check)
    from mmtrain.train import Options, train

    return train(recipe, Options(arguments.check, arguments.profile))


def check_for(recipe: "Recipe", ranks: int, checking: bool) -> int:
    """Check a recipe on a machine that has not got its ranks, such as a login node."""
    from mmtrain.config.errors import ConfigError
    from mmtrain.preflight import preflight, summary

    if not checking:
        raise ConfigError("--ranks belongs to --check; the ranks of a run are started by deepspeed, torchrun or srun")
    preflight(recipe, ranks)
    print(summary(recipe, ranks))
    return 0


if __name__ == "__main__":
    run(main)
