"""Make a sparse model out of a dense one: its MLPs become experts where the recipe has them (co-upcycling).

    python -m tools.upcycle DENSE_CHECKPOINT RECIPE.yaml --out DIR [key=value ...]

DENSE_CHECKPOINT is a step folder, or a run folder (its newest good one). The new checkpoint is DIR/step_00000000;
without noise its logits are those of the dense model. A recipe with `init_from` and `upcycle` does the same by itself.
"""

import argparse
from pathlib import Path

from launch.entry import run, setup


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="checkpoint of the dense model")
    parser.add_argument("recipe", type=Path, help="recipe whose model has the experts")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    arguments = parser.parse_intermixed_args()
    return upcycle(arguments.dense, arguments.recipe, arguments.overrides, arguments.out)


def upcycle(dense: str, path: Path, overrides: list[str], out: Path) -> int:
    """Write the upcycled checkpoint and say what became of which tensor. UserError where the models do not fit."""
    from mmtrain.config.load import load
    from mmtrain.data.tokenizer import Tokenizer
    from mmtrain.run.reader import open_weights
    from mmtrain.start import summary, write_start

    recipe = load(path, [*overrides, f"init_from={dense}"])
    tokenizer = Tokenizer(open_weights(Path(dense)).folder, recipe.data.chat_template)
    started = write_start(recipe, tokenizer, out)
    print(started.report)
    print(summary(started))
    return 0


if __name__ == "__main__":
    run(main)
