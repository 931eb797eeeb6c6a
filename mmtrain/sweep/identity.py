"""What a study is a study of: everything that its trials follow from. Stored with it, compared by every reader."""

import json
from typing import Any

from mmtrain.config.keys import leaves
from mmtrain.config.resume import ALWAYS_FREE
from mmtrain.config.schema import Recipe
from mmtrain.run.manifest import shortened
from mmtrain.sweep.spec import VARIANT, Choices, Sweep

SEEN = ("steps", "epochs", "eval", "data.skip_packs")
UNSEEN = tuple(key for key in ALWAYS_FREE if key not in SEEN and not key.endswith(".pretrained"))
"""Keys and sections of a recipe that no trial's result follows from."""

DEFAULTS = dict(leaves(Recipe()))


def identity(sweep: Sweep) -> dict[str, Any]:
    """What must not change while a study goes on, as JSON values. ConfigError: a recipe of it cannot be."""
    space = {
        key: list(found.values) if isinstance(found, Choices) else {"low": found.low, "high": found.high}
        for key, found in sweep.search.items()
    }
    recipes = {}
    for variant in sweep.variants:
        recipes[f"recipe {variant}".rstrip()] = _values(sweep.recipe_of({VARIANT: variant}, sweep.out), sweep.search)
        if (parent := sweep.parent_of(variant)) is not None:
            recipes[f"parent {variant}".rstrip()] = _values(parent, ())
    whole = {
        "sampler": sweep.sampler,
        "seed": sweep.seed,
        "objective": sweep.objective,
        "set": sweep.set,
        "variants": sweep.variants,
        "search": space,
        "budget": None if sweep.budget is None else [sweep.budget.tokens, sweep.budget.flops],
        "recipes": recipes,
    }
    return json.loads(json.dumps(whole))


def changes(known: dict[str, Any], mine: dict[str, Any]) -> str:
    """In words, what differs between the identity of a study and that of a sweep; empty when nothing does.

    A study of an earlier version holds names of files in place of what its recipes say: these are not compared.
    """
    found = [key for key, value in mine.items() if key != "recipes" and known.get(key) != value]
    if "recipes" in known:
        names = dict.fromkeys((*known["recipes"], *mine["recipes"]))
        found += [f"{name}'s {key}" for name in names for key in _differing(known, mine, name)]
    return shortened(found, 4)


def _differing(known: dict[str, Any], mine: dict[str, Any], name: str) -> list[str]:
    """Keys in which two recipes differ; a key that one of them does not have is at its default there."""
    before, after = known["recipes"].get(name, {}), mine["recipes"].get(name, {})
    keys = dict.fromkeys((*before, *after))
    return [key for key in keys if before.get(key, DEFAULTS.get(key)) != after.get(key, DEFAULTS.get(key))]


def _values(recipe: Recipe, searched: Any) -> dict[str, Any]:
    """What a recipe says besides defaults, free keys and what the points say."""
    return {
        key: value
        for key, value in leaves(recipe)
        if key not in searched and not _unseen(key) and DEFAULTS.get(key, ()) != value
    }


def _unseen(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in UNSEEN)
