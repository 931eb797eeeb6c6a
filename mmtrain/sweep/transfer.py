"""From the best point of a proxy's sweep to the recipe of a wider target.

Only width transfers. What else differs between proxy and target is refused where tuned values are known not to carry
over (shape of the network, experts and their granularity, optimizer), or flagged where they may shift (depth, batch,
horizon, data).
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.keys import leaves
from mmtrain.config.schema import PARTS, Recipe
from mmtrain.model.build import parameter_counts
from mmtrain.mup.laws import mm1_lr, mm1_weight_decay, step_law_batch, step_law_lr
from mmtrain.mup.scales import WIDTHS
from mmtrain.sweep.spec import VARIANT, Sweep, Value
from mmtrain.sweep.study import Trial

TUNABLE = ("optim.lr", "optim.weight_decay", "mup.*")
"""Searched keys that transfer across width; others stay as the target has them."""

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
    ("optim.lr_multipliers", "they are part of the tuned rates"),
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
    ("data.sources*", "data: the best values follow the data"),
    ("data.sequence_length", "batch: tokens of a step"),
    ("data.global_batch", "batch: the best rate grows with it"),
    ("optim.schedule", "schedule"),
    ("optim.warmup_steps", "schedule"),
    ("optim.final_lr_ratio", "schedule"),
    ("optim.clip*", "clipping"),
    ("optim.weight_decay", "regularisation: depends on horizon and data"),
    ("upcycle.*", "another start"),
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


def best_point(sweep: Sweep, trials: list[Trial], variant: str | None = None) -> Best:
    """The point with the lowest mean loss over its seeds; of points with as many seeds as any has.

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
    most = max((len(point) for point in points.values()), default=0)
    found = [point for point in points.values() if len(point) == most and all(math.isfinite(t.loss) for t in point)]
    if not found:
        raise ConfigError(
            f"{sweep.out}: no finished trial of variant {chosen or '(the only one)'}; run the sweep first"
        )
    point = min(found, key=lambda point: sum(trial.loss for trial in point))
    losses = [trial.loss for trial in point]
    params = {key: value for key, value in point[0].params.items() if key != "seed"}
    return Best(params, sum(losses) / most, max(losses) - min(losses), tuple(trial.number for trial in point))


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


def differences(proxy: Recipe, target: Recipe) -> tuple[list[Difference], list[Difference]]:
    """(refused, flagged): what differs besides widths, and the granularity of experts."""
    known = dict(leaves(proxy))
    refused, flagged = [], []
    for key, value in leaves(target):
        was = known.get(key)
        if was == value or key in WIDTH_KEYS:
            continue
        for patterns, found in ((REFUSED, refused), (FLAGGED, flagged)):
            reason = next((reason for pattern, reason in patterns if fnmatchcase(key, pattern)), None)
            if reason is not None:
                found.append(Difference(key, was, value, reason))
                break
    for part in ("vision", "decoder"):
        mine, other = getattr(proxy.model, part), getattr(target.model, part)
        ratios = mine.intermediate_size / mine.hidden_size, other.intermediate_size / other.hidden_size
        if other.moe.num_experts and ratios[0] != ratios[1]:
            key = f"model.{part}: intermediate_size / hidden_size"
            reason = "values do not transfer across expert granularity (arXiv:2508.09752)"
            refused.append(Difference(key, f"{ratios[0]:g}", f"{ratios[1]:g}", reason))
    if proxy.init_from and not target.init_from:
        flagged.append(Difference("init_from", "trained weights", "none", "another start"))
    if target.requires_pretrained and not proxy.init_from:
        reason = "no evidence for a proxy from scratch and a pretrained target; take pretrained siblings as proxies"
        flagged.append(Difference("init_from", "none", "pretrained", reason))
    return refused, flagged


def transferred(best: Best) -> dict[str, Value]:
    """The point's values that the target takes."""
    return {key: value for key, value in best.params.items() if any(fnmatchcase(key, known) for known in TUNABLE)}


def sanity(target: Recipe, lr: float, tokens_of_step: float, steps: int) -> list[str]:
    """What published laws would have taken at the target's size, in words."""
    count = parameter_counts(target.model)["all"]
    embeddings = (
        target.model.decoder.vocab_size * target.model.decoder.hidden_size * (1 if target.model.decoder.tied else 2)
    )
    body, tokens = max(count.active - embeddings, 1), tokens_of_step * steps
    law, other = step_law_lr(body, tokens), mm1_lr(count.active)
    return [
        f"Step Law: lr {law:.2g}, batch {step_law_batch(tokens):,.0f} tokens (N = {body:,} active, D = {tokens:,.0f}); "
        f"here lr {lr:.2g} at the base width, batch {tokens_of_step:,.0f} tokens",
        f"MM1's rule: lr {other:.2g}, weight decay {mm1_weight_decay(other):.2g} (N = {count.active:,} active)",
        "both were fitted in SP on other models: a sanity line, not a source",
    ]
