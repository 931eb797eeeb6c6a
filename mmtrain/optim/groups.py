"""Parameter groups with plain numbers: lr, weight decay and epsilon already multiplied by muP's factors."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Optim, Recipe
from mmtrain.config.suggest import nearest
from mmtrain.mup.registry import Entry, Registry, is_expert


def trainable_names(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """The names that at least one pattern (fnmatch, case matters) of recipe key `trainable` matches.

    Raises ConfigError for a pattern that matches nothing.
    """
    return set().union(*(_matches(pattern, names, f"trainable: {pattern}") for pattern in patterns))


def hyperparameters(name: str, entry: Entry, optim: Optim) -> tuple[float, float, float]:
    """(peak lr, weight decay, eps) of one parameter. Every pattern of optim.lr_multipliers that matches multiplies."""
    lr = optim.lr * entry.lr_mult
    for pattern, factor in optim.lr_multipliers.items():
        if fnmatchcase(name, pattern):
            lr *= factor
    return lr, optim.weight_decay * entry.wd_mult, optim.eps * entry.eps_mult


def param_groups(
    names_and_params: Mapping[str, nn.Parameter], registry: Registry, recipe: Recipe
) -> list[dict[str, Any]]:
    """Groups for any torch-like optimizer, in the order of the parameters; frozen parameters are in none.

    names_and_params  this rank's parameters by their canonical names; a rank may lack some of the registry's.
    A group holds what shares part, expert (whether its tensors hold experts, which other ranks reduce over), lr (the
    peak), weight_decay and eps; its `names` run parallel to its `params`. Weight decay is torch's: p -= lr * decay * p.
    Raises ConfigError for a pattern of `trainable` or `optim.lr_multipliers` that matches none of the registry's names.
    """
    trainable = trainable_names(registry.entries, recipe.trainable)
    for pattern in recipe.optim.lr_multipliers:
        _matches(pattern, registry.entries, f"optim.lr_multipliers.{pattern}")
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in names_and_params.items():
        if name not in trainable:
            continue
        entry = registry[name]
        lr, weight_decay, eps = hyperparameters(name, entry, recipe.optim)
        shared = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "part": entry.part, "expert": is_expert(name)}
        group = groups.setdefault(tuple(shared.values()), {"params": [], "names": [], **shared})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _matches(pattern: str, names: Collection[str], where: str) -> set[str]:
    """Names that `pattern` matches; at least one."""
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        raise ConfigError(f"{where}: matches none of {len(names)} parameters{nearest(pattern, names)}")
    return found
