"""From the best point of a proxy's sweep to the recipe of a wider target.

Only width transfers. What else differs between proxy and target is refused where tuned values are known not to carry
over (shape of the network, experts and their granularity, optimizer), and flagged otherwise (depth, batch, horizon,
data, ...); keys that never change what a run computes are no difference.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.keys import leaves
from mmtrain.config.resume import ALWAYS_FREE
from mmtrain.config.schema import PARTS, Recipe
from mmtrain.model.build import parameter_counts
from mmtrain.mup.laws import mm1_lr, mm1_weight_decay, step_law_batch, step_law_lr
from mmtrain.mup.scales import WIDTHS
from mmtrain.sweep.spec import VARIANT, Sweep, Value
from mmtrain.sweep.study import Trial, to_come

TUNABLE = ("optim.lr", "optim.weight_decay", "mup.*")
"""Searched keys that transfer across width; others stay as the target has them."""

NOT_COMPARED = (*ALWAYS_FREE, "seed", "init_from", "optim.lr", "mup")
"""Keys and sections that are no difference, or looked at by themselves: start, horizon, what is carried anyway."""

WIDTH_KEYS = tuple(f"model.{part}.{key}" for part in PARTS for key in WIDTHS[part] if key != "num_experts")

REFUSED = (
    ("model.*.moe.num_experts", "values do not transfer across the share of active experts (arXiv:2601.20205)"),
    ("model.*.moe.*", "routing must be the same"),
    ("model.*.kind", "another connector is another network"),
    ("model.*.norm*", "another norm is another network"),
    ("model.*.activation", "another activation is another network"),
    ("model.*.tied", "a tied head is another network"),
    ("model.*.rope", "positions must work alike"),
    ("model.*.qk_norm", "attention logits scale otherwise"),
    ("model.*.attention_bias", "another network"),
    ("model.*.class_token", "another network"),
    ("model.*.pre_norm", "another network"),
    ("model.*.final_norm", "another network"),
    ("optim.name", "another optimizer has other rules"),
    ("optim.beta*", "the best rate moves with them"),
    ("optim.lr_multipliers*", "they are part of the tuned rates"),
    ("trainable", "other parameters would learn"),
)

FLAGGED = (
    ("model.*.num_layers", "depth: rates shift with it; width alone is proved"),
    ("model.vision.image_size", "resolution: more patches an image"),
    ("model.vision.patch_size", "resolution: more patches an image"),
    ("model.vision.select_layer", "depth of the tower"),
    ("model.connector.num_tokens", "image tokens: another share of the sequence"),
    ("model.connector.depth", "depth of the connector"),
    ("model.decoder.vocab_size", "vocabulary: the best embedding rate moves with it (arXiv:2506.15025)"),
    ("data.sequence_length", "batch: tokens of a step"),
    ("data.global_batch", "batch: the best rate grows with it"),
    ("data.*", "data: the best values follow the data"),
    ("optim.schedule", "schedule"),
    ("optim.warmup_steps", "schedule"),
    ("optim.final_lr_ratio", "schedule"),
    ("optim.clip*", "clipping"),
    ("optim.weight_decay", "regularisation: depends on horizon and data"),
    ("optim.*", "the best rate may move with it"),
    ("parallel.precision", "rounding: the highest stable rate may move with it"),
    ("upcycle.*", "another start"),
    ("*", "only width is proved to carry over"),
)


@dataclass(frozen=True)
class Difference:
    """One key in which proxy and target differ."""

    key: str
    proxy: Any
    target: Any
    reason: str

    def words(self) -> str:
        return f"{self.key}: {self.proxy} -> {self.target} ({self.reason})"


@dataclass(frozen=True)
class Best:
    """The best point of a sweep."""

    params: dict[str, Value]
    loss: float
    """Mean over seeds."""
    spread: float
    """Highest less lowest over seeds."""
    trials: tuple[int, ...]
    passed_over: tuple[tuple[int, float], ...] = ()
    """(first trial, mean loss) of points that are below it with fewer seeds."""


def best_point(sweep: Sweep, trials: list[Trial], variant: str | None = None) -> Best:
    """The point with the lowest mean loss over its seeds, of the points with as many seeds as any that never diverged.

    One lucky seed chooses no point: what is lower with fewer seeds is named in `passed_over`.

    variant: whose trials count; the sweep's only one when None. ConfigError: there is no finished trial of it.
    """
    names = list(sweep.variants)
    if variant is None and len(names) > 1:
        raise ConfigError(f"{sweep.file}: has the variants {', '.join(names)}; say which one is the proxy")
    chosen = names[0] if variant is None else variant
    points: dict[tuple, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.params.get(VARIANT) == chosen and trial.state in ("done", "diverged"):
            points[tuple(sorted((k, v) for k, v in trial.params.items() if k not in ("seed", VARIANT)))].append(trial)
    stable = [point for point in points.values() if all(math.isfinite(trial.loss) for trial in point)]
    if not stable:
        raise ConfigError(
            f"{sweep.out}: no finished trial of variant {chosen or '(the only one)'}; run the sweep first"
        )
    most = max(len(point) for point in stable)
    point = min((point for point in stable if len(point) == most), key=_mean)
    losses = [trial.loss for trial in point]
    params = {key: value for key, value in point[0].params.items() if key != "seed"}
    lower = tuple((other[0].number, _mean(other)) for other in stable if _mean(other) < _mean(point))
    return Best(params, _mean(point), max(losses) - min(losses), tuple(trial.number for trial in point), lower)


def _mean(point: list[Trial]) -> float:
    return fmean(trial.loss for trial in point)


def unfinished(sweep: Sweep, trials: list[Trial]) -> str:
    """What of a study has not ended, in words; nothing when it has."""
    running, later = sum(trial.state == "running" for trial in trials), to_come(sweep, trials)
    return f"{running} trials run, {later} are to come" if running or later else ""


def at_edge(sweep: Sweep, best: Best) -> list[str]:
    """Searched keys whose best value is the first or last that was tried: the optimum may lie outside."""
    found = []
    for key, space in sweep.search.items():
        values = [value for value in getattr(space, "values", ()) if isinstance(value, (int, float))]
        low, high = (
            (min(values), max(values)) if values else (getattr(space, "low", None), getattr(space, "high", None))
        )
        if key == "seed" or low is None or low == high:
            continue
        slack = 1.0 if values else 1.1
        if best.params[key] <= low * slack or best.params[key] >= high / slack:
            found.append(f"{key}={best.params[key]:g} is at the edge of what was tried ({low:g} to {high:g})")
    return found


def base_widths(proxy: Recipe) -> dict[str, dict[str, int]]:
    """The widths at which the proxy's values are stated: its own mup.base, or its own widths."""
    found: dict[str, dict[str, int]] = {}
    for part in PARTS:
        config = getattr(proxy.model, part)
        own = {key: getattr(config, key) for key in WIDTHS[part] if key != "num_experts"}
        found[part] = own | proxy.mup.base.get(part, {})
    return found


def carried_base(proxy: Recipe, target: Recipe) -> dict[str, dict[str, int]]:
    """The base widths that the target gets; none for a pretrained part, whose base is its own width."""
    return {part: own for part, own in base_widths(proxy).items() if not getattr(target.model, part).pretrained}


def differences(proxy: Recipe, target: Recipe) -> tuple[list[Difference], list[Difference]]:
    """(refused, flagged): what differs besides greater widths, and the granularity of experts."""
    mine, other = _compared(proxy), _compared(target)
    refused: list[Difference] = []
    flagged: list[Difference] = []
    for key in dict.fromkeys((*other, *mine)):
        was, value = mine.get(key, "not set"), other.get(key, "not set")
        if key in WIDTH_KEYS:
            if value < was:
                flagged.append(Difference(key, was, value, "narrower than the proxy: values carry over to wider ones"))
        elif was != value:
            reason, found = next(
                (reason, found)
                for patterns, found in ((REFUSED, refused), (FLAGGED, flagged))
                for pattern, reason in patterns
                if fnmatchcase(key, pattern)
            )
            found.append(Difference(key, was, value, reason))
    for part in ("vision", "decoder"):
        mine, other = getattr(proxy.model, part), getattr(target.model, part)
        ratios = mine.intermediate_size / mine.hidden_size, other.intermediate_size / other.hidden_size
        if other.moe.num_experts and ratios[0] != ratios[1]:
            key = f"model.{part}: intermediate_size / hidden_size"
            reason = "values do not transfer across expert granularity (arXiv:2508.09752)"
            refused.append(Difference(key, f"{ratios[0]:g}", f"{ratios[1]:g}", reason))
    return refused, flagged + _starts(proxy, target)


def _compared(recipe: Recipe) -> dict[str, Any]:
    """Every value that is set, but for those of NOT_COMPARED."""
    return {
        key: value
        for key, value in leaves(recipe)
        if value not in ({}, None) and not any(key == name or key.startswith(name + ".") for name in NOT_COMPARED)
    }


def _starts(proxy: Recipe, target: Recipe) -> list[Difference]:
    """What their first weights have to do with each other."""
    found = []
    pretrained = [part for part in PARTS if getattr(target.model, part).pretrained]
    if proxy.init_from and not target.init_from and not target.requires_pretrained:
        found.append(Difference("init_from", "trained weights", "none", "another start"))
    if (target.requires_pretrained or pretrained) and not proxy.init_from:
        reason = "no evidence for a proxy from scratch and a pretrained target; take pretrained siblings as proxies"
        found.append(Difference("init_from", "none", "pretrained", reason))
    reason = "its base is its own width, and the proxy's rates reach it unscaled: nothing says that they fit"
    return found + [
        Difference(f"model.{part}.pretrained", "none", getattr(target.model, part).pretrained, reason)
        for part in pretrained
    ]


def horizon(facts: dict[str, Any], target: Recipe, tokens_of_step: float) -> Difference | None:
    """How much longer the target trains than the trial with these facts; None where it is within a tenth."""
    was = f"{facts['tokens']:,.0f} tokens in {facts['steps']} steps"
    tokens = tokens_of_step * target.steps
    if target.steps == facts["steps"] and abs(tokens - facts["tokens"]) <= 0.1 * facts["tokens"]:
        return None
    value = f"{tokens:,.0f} in {target.steps}" if target.steps else f"{target.epochs:g} epochs"
    return Difference("horizon", was, value, "the best rate moves with the tokens of a run")


def transferred(best: Best, proxy: Recipe, target: Recipe) -> dict[str, Value]:
    """The point's values that the target takes, and the proxy's other rates and multipliers where the target's differ:
    the best values were found beside these."""
    found = {key: value for key, value in best.params.items() if any(fnmatchcase(key, known) for known in TUNABLE)}
    other = _multipliers(target)
    return found | {
        key: value for key, value in _multipliers(proxy).items() if key not in found and other[key] != value
    }


def _multipliers(recipe: Recipe) -> dict[str, Value]:
    """The rate and all that muP multiplies, a part without a factor of its own included."""
    factors = {f"mup.{key}": value for key, value in leaves(replace(recipe.mup, base={}, lr={})) if value != {}}
    parts = {f"mup.lr.{part}": recipe.mup.lr.get(part, 1.0) for part in PARTS}
    return {"optim.lr": recipe.optim.lr, **factors, **parts}


def sanity(target: Recipe, lr: float, tokens_of_step: float, steps: int) -> list[str]:
    """What published laws would have taken at the target's size, in words."""
    count = parameter_counts(target.model)["all"]
    embeddings = (
        target.model.decoder.vocab_size * target.model.decoder.hidden_size * (1 if target.model.decoder.tied else 2)
    )
    body, tokens = max(count.active - embeddings, 1), tokens_of_step * steps
    other = mm1_lr(count.active)
    found = [
        f"MM1's rule: lr {other:.2g}, weight decay {mm1_weight_decay(other):.2g} (N = {count.active:,} active); "
        f"here lr {lr:.2g} at the base width",
        "fitted in SP on other models: a sanity line, not a source",
    ]
    if not steps:
        return ["Step Law: needs the steps of the target, which runs by epochs", *found]
    law = (
        f"Step Law: lr {step_law_lr(body, tokens):.2g}, batch {step_law_batch(tokens):,.0f} tokens (N = {body:,} "
        f"active, D = {tokens:,.0f}); here batch {tokens_of_step:,.0f} tokens"
    )
    return [law, *found]
