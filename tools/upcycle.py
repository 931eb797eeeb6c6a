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
    from mmtrain.assemble import blueprint
    from mmtrain.config.load import dump, load
    from mmtrain.model.balance import RouterState
    from mmtrain.model.build import parameter_counts
    from mmtrain.parallel.box import Box
    from mmtrain.run.comm import SingleProcess
    from mmtrain.run.manifest import RunState
    from mmtrain.run.reader import open_weights
    from mmtrain.run.saver import write_whole
    from mmtrain.weights import Weights, stored_shapes

    recipe = load(path, [*overrides, f"init_from={dense}"])
    _, registry = blueprint(recipe)
    weights = Weights(recipe, registry, SingleProcess())
    print(weights.report)
    tokenizer = open_weights(Path(dense)).file("tokenizer.json")
    state = RunState(
        optimizer_steps=0,
        recipe=dump(recipe),
        mesh={"world": 1, "tensor": 1, "expert": 1, "zero_stage": 0},
        registry_hash=registry.hash(),
        routers=RouterState.first(recipe.model).as_json(),
    )
    tensors = ((name, weights.make(name, Box.whole(shape))) for name, shape in stored_shapes(registry).items())
    folder = write_whole(out, 0, tensors, state, {"tokenizer.json": tokenizer})
    count = parameter_counts(recipe.model)["all"]
    print(f"{folder}: {count.total:,} parameters, {count.active:,} active for a token")
    return 0


if __name__ == "__main__":
    run(main)
