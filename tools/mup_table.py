"""Print what muP says of every parameter of a recipe: kind, fans, width ratios, initial std, rates, forward factor.

python -m tools.mup_table RECIPE.yaml [key=value ...]
python -m tools.mup_table RECIPE.yaml --bsh base.bsh      # also write the base-shape file of PyPI `mup`

Layers that agree share a row: * stands for their numbers. A fan reads value/base. Nothing is trained or allocated.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmtrain.config.errors import UserError
from mmtrain.config.load import load
from mmtrain.config.schema import Model, Recipe
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.registry import Entry, Registry
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.mup.shapes import write_base_shapes
from mmtrain.optim.groups import hyperparameters, trainable_names

COLUMNS = ("parameter", "n", "kind", "fan in", "fan out", "m in", "m out", "init std", "lr", "decay", "eps", "forward")


def rows(recipe: Recipe) -> list[tuple[str, ...]]:
    """The table's rows, in the order of the model; cells as in COLUMNS. lr is the peak, or `frozen`.

    Raises ConfigError when mup.base, trainable or mup.lr cannot be.
    """
    base = base_model_config(recipe.model, recipe.mup.base)
    registry = Registry.build(_meta(recipe.model), _meta(base), recipe.mup)
    scales = forward_scales(recipe.model, base, recipe.mup)
    trainable = trainable_names(registry.entries, recipe.trainable)
    merged: dict[tuple[str, ...], int] = {}
    for name, entry in registry.entries.items():
        lr, decay, eps = hyperparameters(name, entry, recipe.optim)
        row = (
            re.sub(r"\.\d+(?=\.)", ".*", name),
            entry.role.kind,
            "" if entry.role.fan_in is None else f"{entry.role.fan_in}/{entry.base_fan_in}",
            f"{entry.role.fan_out}/{entry.base_fan_out}",
            f"{entry.m_in:g}",
            f"{entry.m_out:g}",
            f"{entry.init_std:.4g}" if entry.role.init == "normal" else entry.role.init,
            f"{lr:.4g}" if name in trainable else "frozen",
            f"{decay:.4g}",
            f"{eps:.4g}",
            _forward(name, entry, scales, recipe.model.decoder.tied),
        )
        merged[row] = merged.get(row, 0) + 1
    return [(row[0], str(count), *row[1:]) for row, count in merged.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--bsh", type=Path, help="where to write the base-shape file")
    args = parser.parse_args(argv)
    try:
        recipe = load(args.recipe, args.overrides)
        table = Table(*COLUMNS, title=f"muP of {recipe.name}", box=None)
        for row in rows(recipe):
            table.add_row(*row)
        if args.bsh:
            base = base_model_config(recipe.model, recipe.mup.base)
            write_base_shapes(_meta(recipe.model), _meta(base), args.bsh)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    console = Console()
    unbounded = console.options.update(max_width=1_000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)  # whole rows, in a pipe too
    console.print(table)
    return 0


def _meta(model: Model) -> VisionLanguageModel:
    with torch.device("meta"):
        return VisionLanguageModel(model)


def _forward(name: str, entry: Entry, scales: Scales, tied: bool) -> str:
    """The factor that muP puts into the forward at this weight; empty where the forward is plain."""
    if name == "decoder.embedding.weight":
        return f"{scales.embedding:.4g}" + (f", logits {scales.output:.4g}" if tied else "")
    if entry.role.kind == "head":
        return f"logits {scales.output:.4g}"
    attention = getattr(scales, f"attention_{entry.part}")
    return f"q.k {attention:.4g}" if name.endswith("attention.q.weight") and attention is not None else ""


if __name__ == "__main__":
    sys.exit(main())
