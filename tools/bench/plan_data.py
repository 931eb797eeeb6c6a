"""How full the packs of recipes would be at several lengths, from metadata alone.

    python -m tools.bench.plan_data [RECIPES] [key=value ...] [--packs 2000] [--save]

Each recipe is planned with its own image tokens and with MM1's 144, with as many images allowed as fit by tokens (at
least 16). tools/plan_data.py says what the numbers mean; those per second are of processor time, on whatever else runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config.load import load
from mmtrain.data.loader import make_planner
from mmtrain.data.tokenizer import Tokenizer
from tools.bench.record import ROOT, tell
from tools.plan_data import measure

REAL = ("2_prefinetune", "3_instruct")
LENGTHS = (512, 2048, 4096)
MM1_IMAGE_TOKENS = 144
KEPT = (
    "padding",
    "longest_wait",
    "shorter_than_a_pack_but_cut",
    "unusable",
    "mixture",
    "off",
    "off_at_most",
    "images_per_pack",
    "documents_per_second",
    "packs_per_second",
)


def rows(path: Path, overrides: Sequence[str], packs: int) -> list[dict[str, Any]]:
    """The measurements of one recipe."""
    made = []
    for image_tokens in (load(path, overrides).model.connector.num_tokens, MM1_IMAGE_TOKENS):
        for length in LENGTHS:
            images = max(16, length // image_tokens)
            if image_tokens * 2 > length:
                continue
            changes = [f"data.sequence_length={length}", f"data.max_images={images}"]
            recipe = load(path, [*overrides, *changes, f"model.connector.num_tokens={image_tokens}"])
            planner, _ = make_planner(
                recipe, Tokenizer(recipe.data.tokenizer, recipe.data.chat_template), recipe.data.sources
            )
            found = measure(recipe, planner, packs, 1)
            row = {name: rounded(found[name]) for name in KEPT if name in found}
            made.append({"length": length, "image_tokens": image_tokens, "max_images": images} | row)
    return made


def rounded(value: Any) -> Any:
    """Short enough to read."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return round(value, 5 if abs(value) < 100 else None) if isinstance(value, float) else value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="recipes (default: the two real ones), key=value")
    parser.add_argument("--packs", type=int, default=2000, help="packs of each row (default: 2000)")
    parser.add_argument("--save", action="store_true", help="write results/plan_data.json too")
    arguments = parser.parse_intermixed_args()
    overrides = [word for word in arguments.words if "=" in word]
    recipes = [Path(word) for word in arguments.words if "=" not in word]
    for name in REAL if not recipes else ():
        recipes.append(ROOT / "configs" / "recipes" / "real" / f"{name}.yaml")
    found = {path.stem: rows(path, overrides, arguments.packs) for path in recipes}
    tell({"bench": "plan_data", "packs": arguments.packs, "recipes": found}, arguments.save)


if __name__ == "__main__":
    main()
