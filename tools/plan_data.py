"""Show what a recipe will read, from metadata alone: first packs, mixture, padding, epochs, balance of ranks.

python -m tools.plan_data RECIPE.yaml [key=value ...] [--packs 2000] [--ranks 8] [--show 5] [--json FILE]

No tar is opened. `longest wait` counts packs from a document's drawing to its pack. `off the weights` is the largest
distance of a share from its weight in any 1,000 neighbouring packs (in whole steps), and what is proved of it.
`balance` is the mean over steps of (mean cost of a rank / highest cost of a rank), cost being model FLOPs of the rank's
packs: 1 is perfect.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmtrain.config.errors import ConfigError, UserError
from mmtrain.config.load import load
from mmtrain.config.schema import Recipe
from mmtrain.data.batch import canvas_of
from mmtrain.data.index import read_index
from mmtrain.data.loader import make_planner
from mmtrain.data.ordering import Planned, Sizer
from mmtrain.data.plan import Planner
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.model.build import Flops

STRETCH = 1000
"""Packs in which the mixture is looked at."""


def measure(recipe: Recipe, planner: Planner, packs: int, ranks: int) -> dict[str, Any]:
    """Plan at least `packs` packs (whole steps) and measure them. Shares and padding are fractions of 1."""
    data = recipe.data
    tokens = images = documents = cuts = empty = full = most_images = longest = 0
    whole = sizes_of(recipe)
    cut_short: set[tuple[int, int]] = set()
    history = [list(planner.served.values())]
    balances: list[float] = []
    flops = Flops.of(recipe.model)
    skipped: Counter[str] = Counter()
    names = list(data.sources)
    began = time.process_time()
    seconds = 0.0
    made = 0
    while made < packs and not planner.finished:
        step = planner.next_step()
        seconds += time.process_time() - began
        skipped.update(names[sample.source] for sample in step.skipped)
        costs = [0.0] * ranks
        for number, pack in enumerate(step.packs):
            panels = sum(planned.panels for planned in pack)
            tokens += sum(planned.tokens for planned in pack)
            images, most_images = images + panels, max(most_images, panels)
            documents += len(pack)
            stretches = [planned for planned in pack if planned.cut]
            cuts += len(stretches)
            cut_short.update((p.source, p.ordinal) for p in stretches if whole(p) <= data.sequence_length)
            empty += not pack
            full += panels == data.max_images
            costs[number % data.num_lanes() % ranks] += pack_flops(flops, pack)
        if any(costs):
            balances.append(sum(costs) / ranks / max(costs))
        longest = max(longest, planner.longest_wait)
        history.append(list(planner.served.values()))
        made += len(step.packs)
        began = time.process_time()
    filled = max(made - empty, 1)
    served = planner.served
    return {
        "packs": made,
        "documents": documents,
        "cut": cuts,
        "shorter_than_a_pack_but_cut": len(cut_short),
        "unusable": dict(skipped),
        "tokens": tokens,
        "padding": 1 - tokens / (filled * data.sequence_length),
        "images_per_pack": images / filled,
        "most_images": most_images,
        "packs_without_room_for_an_image": full / filled,
        "longest_wait": longest,
        "mixture": {name: count / max(sum(served.values()), 1) for name, count in served.items()},
        **off_the_weights(recipe, planner, history),
        "epochs": planner.epochs,
        "balance": sum(balances) / max(len(balances), 1),
        "documents_per_second": documents / max(seconds, 1e-9),
        "packs_per_second": made / max(seconds, 1e-9),
    }


def sizes_of(recipe: Recipe) -> Callable[[Planned], int]:
    """Positions of the whole document that a stretch belongs to."""
    sizer = Sizer(canvas_of(recipe), recipe.model.connector.num_tokens)

    @lru_cache
    def of_shard(path: str) -> np.ndarray:
        return sizer.rooms(read_index(path).columns)[0]

    return lambda planned: int(of_shard(planned.index)[planned.row])


def off_the_weights(recipe: Recipe, planner: Planner, history: Sequence[Sequence[int]]) -> dict[str, float]:
    """How far the shares of STRETCH packs are off the weights at most, and at most by proof; nothing if too few.

    `history`: tokens served by source before each step, and after the last.
    """
    steps = -(-STRETCH // recipe.data.global_batch)
    if len(history) <= steps:
        return {}
    made = np.array(history[steps:]) - np.array(history[:-steps])
    weights = np.array([recipe.data.sources[name].weight for name in planner.served])
    bound = max(planner.mixture_bound().values())
    return {
        "off": float(np.abs(made / made.sum(1, keepdims=True) - weights / weights.sum()).max()),
        "off_at_most": float(bound / made.sum(1).min()),
    }


def pack_flops(flops: Flops, pack: Sequence[Planned]) -> float:
    """Those of a pack whose documents do not see each other, every position a target."""
    return sum(flops.step(planned.tokens, planned.panels, planned.tokens, (planned.tokens + 1) / 2) for planned in pack)


def first_packs(recipe: Recipe, planner: Planner, count: int) -> Table:
    """The first packs of a new plan, a row each."""
    table = Table("pack", "lane", "documents", "tokens", "free", "images", *recipe.data.sources, box=None)
    number = 0
    while number < count and not planner.finished:
        for lane, pack in enumerate(planner.next_step().packs):
            if number < count:
                tokens = sum(planned.tokens for planned in pack)
                by_source = Counter(planned.source for planned in pack)
                cells = [
                    number,
                    lane % recipe.data.num_lanes(),
                    len(pack),
                    tokens,
                    recipe.data.sequence_length - tokens,
                ]
                cells += [sum(planned.panels for planned in pack)]
                table.add_row(*map(str, cells), *(str(by_source[n]) for n in range(len(recipe.data.sources))))
            number += 1
    return table


def summary(recipe: Recipe, found: dict[str, Any], ranks: int) -> Table:
    """The measurements as a table."""
    table = Table("what", "value", box=None)
    total = sum(source.weight for source in recipe.data.sources.values())
    all_packs = recipe.steps * recipe.data.global_batch
    table.add_row("packs", f"{found['packs']:,} of {found['documents']:,} documents ({found['cut']:,} are stretches)")
    table.add_row("cut though short", f"{found['shorter_than_a_pack_but_cut']:,} (for their images)")
    table.add_row("padding", f"{found['padding']:.3%}")
    table.add_row("images a pack", f"{found['images_per_pack']:.2f}, at most {found['most_images']}")
    table.add_row(
        "full of images", f"{found['packs_without_room_for_an_image']:.1%} (data.max_images={recipe.data.max_images})"
    )
    table.add_row("longest wait", f"{found['longest_wait']} packs (data.max_wait={recipe.data.max_wait})")
    for name, share in found["mixture"].items():
        wanted = recipe.data.sources[name].weight / total
        epochs = found["epochs"][name]
        later = f", {epochs * all_packs / found['packs']:.2f} after all {recipe.steps} steps" if recipe.steps else ""
        table.add_row(f"tokens, {name}", f"{share:.2%}, wanted {wanted:.2%}; {epochs:.2f} epochs{later}")
    if "off" in found:
        table.add_row(
            "off the weights", f"{found['off']:.2%} in {STRETCH} packs at most; proved: {found['off_at_most']:.2%}"
        )
    for name, count in found["unusable"].items():
        table.add_row(f"unusable, {name}", f"{count:,}")
    table.add_row(f"balance of {ranks} ranks", f"{found['balance']:.3f}")
    speed = f"{found['documents_per_second']:,.0f} documents, {found['packs_per_second']:,.0f} packs"
    table.add_row("planned", f"{speed} a second of processor time")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe file")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--packs", type=int, default=2000, help="packs to measure (default: 2000)")
    parser.add_argument("--ranks", type=int, default=0, help="data-parallel ranks of the balance (default: all lanes)")
    parser.add_argument("--show", type=int, default=5, help="packs to list (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    args = parser.parse_intermixed_args(argv)
    console = Console()
    console.width = max(console.width, 120)  # whole rows, in a pipe too
    try:
        recipe = load(args.recipe, args.overrides)
        lanes = recipe.data.num_lanes()
        ranks = args.ranks or lanes
        if lanes % ranks:
            fitting = [number for number in range(1, lanes + 1) if lanes % number == 0]
            raise ConfigError(f"--ranks {ranks} does not divide the {lanes} lanes; numbers that fit: {fitting}")
        tokenizer = Tokenizer(recipe.data.tokenizer, recipe.data.chat_template)
        console.print(first_packs(recipe, make_planner(recipe, tokenizer, recipe.data.sources)[0], args.show))
        planner = make_planner(recipe, tokenizer, recipe.data.sources)[0]
        found = measure(recipe, planner, args.packs, ranks)
        console.print(summary(recipe, found, ranks))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
