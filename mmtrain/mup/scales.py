"""The base model's config, and the factors that muP puts into the forward."""

from dataclasses import replace
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.layout import hidden_width, multiples
from mmtrain.config.schema import PARTS, Model, Mup
from mmtrain.config.suggest import nearest
from mmtrain.mup.roles import Scales

WIDTHS = {
    "vision": ("hidden_size", "num_heads", "intermediate_size", "num_experts"),
    "connector": ("hidden_size", "num_heads", "num_experts"),
    "decoder": ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "num_experts"),
}
"""Keys of mup.base by part. num_experts is moe.num_experts; depth is no width and never differs from the base."""


def base_model_config(model: Model, base: dict[str, dict[str, int]]) -> Model:
    """`model` at the base widths: every width that `base` (the recipe's mup.base) names takes its value from there.

    Raises one ConfigError that lists every unknown part, unknown key and impossible value.
    """
    problems = [
        f"mup.base.{part}: the parts are {', '.join(PARTS)}{nearest(part, PARTS)}" for part in base if part not in PARTS
    ]
    parts = {
        part: _at_base(part, getattr(model, part), widths, problems) for part, widths in base.items() if part in PARTS
    }
    based = replace(model, **parts)
    if not problems:
        problems += _impossible(based)
    if problems:
        raise ConfigError("the base of muP cannot be built:\n" + "\n".join(f"  {problem}" for problem in problems))
    return based


def forward_scales(model: Model, base: Model, mup: Mup) -> Scales:
    """The forward's factors for `model` against `base`; plain SP when both are equal and the multipliers are 1.

    Attention: sqrt(base head size) / head size instead of 1/sqrt(head size), times mup.attention (vision and decoder)
    or mup.cross_attention (connector); logits: base width / width, times mup.output.
    """
    connector_scale = None
    if model.connector.kind == "attention_pool":
        head_sizes = _head_size(model.connector), _head_size(base.connector)
        connector_scale = _attention(*head_sizes, mup.cross_attention)
    return Scales(
        attention_vision=_attention(_head_size(model.vision), _head_size(base.vision), mup.attention),
        attention_connector=connector_scale,
        attention_decoder=_attention(model.decoder.head_dim, base.decoder.head_dim, mup.attention),
        embedding=mup.embedding,
        output=mup.output * base.decoder.hidden_size / model.decoder.hidden_size,
    )


def forward_factors(model: Model, mup: Mup) -> dict[str, float]:
    """The same factors as numbers, by name and part: those of attention stand for 1/sqrt(head size) too.

    ConfigError: the base widths cannot be.
    """
    scales = forward_scales(model, base_model_config(model, mup.base), mup)
    attention = {
        "attention of vision": (scales.attention_vision, _head_size(model.vision)),
        "attention of decoder": (scales.attention_decoder, model.decoder.head_dim),
    }
    if model.connector.kind == "attention_pool":
        attention["attention of connector"] = scales.attention_connector, _head_size(model.connector)
    found = {name: size**-0.5 if factor is None else factor for name, (factor, size) in attention.items()}
    return {**found, "embedding of decoder": scales.embedding, "output of decoder": scales.output}


def _at_base(part: str, config: Any, widths: dict[str, int], problems: list[str]) -> Any:
    """The part's config with the widths replaced; what is wrong with them is added to `problems`."""
    changes = {}
    for key, value in widths.items():
        where = f"mup.base.{part}.{key}"
        if key not in WIDTHS[part]:
            allowed = ", ".join(WIDTHS[part])
            problems.append(f"{where}: no width of {part}{nearest(key, WIDTHS[part])}; its widths are {allowed}")
        elif value < 1:
            problems.append(f"{where}: is {value}; a base width is at least 1")
        elif key != "num_experts":
            changes[key] = value
        elif config.moe.num_experts == 0:
            problems.append(f"{where}: is {value}, but model.{part} has no experts; leave it out")
        else:
            changes["moe"] = replace(config.moe, num_experts=value)
    return replace(config, **changes)


def _impossible(base: Model) -> list[str]:
    """Combinations of base widths that no model can have."""
    problems = []
    for part in ("vision", "connector"):
        config = getattr(base, part)
        has_heads = part == "vision" or config.kind == "attention_pool"
        if has_heads and config.hidden_size % config.num_heads:
            problems.append(
                f"mup.base.{part}: hidden_size {config.hidden_size} is no multiple of num_heads {config.num_heads}; "
                f"name both in mup.base.{part}"
            )
    if base.decoder.num_heads % base.decoder.num_kv_heads:
        problems.append(
            f"mup.base.decoder: num_heads {base.decoder.num_heads} is no multiple of num_kv_heads "
            f"{base.decoder.num_kv_heads}; name both in mup.base.decoder"
        )
    for part in PARTS:
        moe = getattr(base, part).moe
        if moe.num_experts and moe.num_experts < moe.top_k:
            problems.append(
                f"mup.base.{part}.num_experts: is {moe.num_experts}, but each token visits top_k {moe.top_k}; "
                f"take at least {moe.top_k}"
            )
        key, width = hidden_width(base, part)
        if moe.num_experts and width % moe.granularity:
            problems.append(
                f"mup.base: {key.removeprefix('model.')} is {width} there, no multiple of model.{part}.moe.granularity "
                f"{moe.granularity}; {multiples(width, moe.granularity)}"
            )
    return problems


def _head_size(config: Any) -> int:
    return config.hidden_size // config.num_heads


def _attention(head_size: int, base_head_size: int, multiplier: float) -> float | None:
    """The factor on q.k; None, which means 1/sqrt(head size), when it would be just that."""
    if head_size == base_head_size and multiplier == 1.0:
        return None
    return multiplier * base_head_size**0.5 / head_size
