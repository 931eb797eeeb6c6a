"""What the config.json of a Hugging Face folder says of a part, in a recipe's words. Standard library only.

Public files leave out what is a family's default, so the defaults of each family stand here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.suggest import nearest

Json = Mapping[str, Any]

CONFIG = "config.json"

VISION_FAMILIES = ("clip_vision_model", "siglip_vision_model")
DECODER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe")
WHOLE_FAMILIES = ("llava", "llava_next")
OWN = "mmtrain"
"""What tools.convert writes for models that no public class holds: it comes in again as it left."""

_OWN_FREE = (
    "image_size",
    "vocab_size",
    "moe.balance",
    "moe.balance_scope",
    "moe.balance_coef",
    "moe.z_coef",
    "moe.bias_rate",
)
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # a two-tower model -> its image tower
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

_VISION_DEFAULTS: dict[str, Json] = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_VISION_SHARED = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}

_DECODER_SHARED = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
_DECODER_DEFAULTS: dict[str, Json] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128},
    "mixtral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
    "olmoe": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "intermediate_size": 2048,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
    },
}


@dataclass(frozen=True)
class Described:
    """One part of a pretrained model."""

    family: str
    """model_type of the part (of the whole model, for a connector)."""
    fixed: dict[str, Any]
    """Dotted key inside the part -> value that a recipe cannot change."""
    free: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value that holds unless the recipe gives another."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of `folder`. ConfigError: no folder, no such file, not JSON, no model_type."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name one that holds a Hugging Face {CONFIG} and its weights")
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no {CONFIG}, so it is no Hugging Face checkpoint; weights of mmtrain go into init_from"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); get the file anew") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path}: says no model_type, so the architecture is unknown; get the file anew")
    return config


def describe(folder: Path, part: str) -> Described:
    """What the checkpoint in `folder` says of `part`. ConfigError: an architecture that the model cannot hold."""
    config, where = read_config(folder), folder / CONFIG
    kind = config["model_type"]
    whole = config if kind in WHOLE_FAMILIES else None
    if kind == OWN:
        return _own(config, part, where)
    if part == "connector":
        return _connector(_known(kind, WHOLE_FAMILIES, part, where), config, where)
    if part == "vision":
        inner = config.get("vision_config", {}) if whole or kind in _TOWERS else config
        inner_kind = _TOWERS.get(kind) or (inner.get("model_type", VISION_FAMILIES[0]) if whole else kind)
        return _vision(_known(inner_kind, VISION_FAMILIES, part, where), inner, whole, where)
    inner = config.get("text_config", {}) if whole else config
    inner_kind = inner.get("model_type", "llama") if whole else kind
    return _decoder(_known(inner_kind, DECODER_FAMILIES, part, where), inner, where)


def _own(config: Json, part: str, where: Path) -> Described:
    """A part of a model that left mmtrain with its own code."""
    scales = {key: value for key, value in config["scales"].items() if value not in (None, 1.0)}
    if scales:
        raise ConfigError(
            f"{where}: the model was trained with factors of muP ({', '.join(scales)}), which a pretrained part has "
            "not; give its own checkpoint as init_from"
        )
    found: dict[str, Any] = {}
    for key, value in config["parts"][part].items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": given for inner, given in value.items()}
        else:
            found[key] = tuple(value) if isinstance(value, list) else value
    free = {key: found.pop(key) for key in _OWN_FREE if key in found}
    return Described(OWN, found, free)


def _known(kind: str, families: tuple[str, ...], part: str, where: Path) -> str:
    """`kind`, if `part` can be read from it."""
    if kind in families:
        return kind
    choices = (*families, OWN, *(_TOWERS if part == "vision" else ()), *(WHOLE_FAMILIES if part != "connector" else ()))
    raise ConfigError(
        f"{where}: model_type {kind!r} is none that model.{part} can be read from{nearest(kind, choices)}; "
        f"there are {', '.join(choices)}"
    )


def _refuse(problems: list[str], where: Path) -> None:
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}; mmtrain has no such layer, take another checkpoint")


def _vision(family: str, given: Json, whole: Json | None, where: Path) -> Described:
    """An image tower, alone or inside a whole model."""
    config = {**_VISION_SHARED, **_VISION_DEFAULTS[family], **given}
    clip = family == "clip_vision_model"
    problems = []
    if config["hidden_act"] not in _ACTIVATIONS:
        problems.append(f"hidden_act {config['hidden_act']!r} is none of {', '.join(_ACTIVATIONS)}")
    if not isinstance(config["image_size"], int) or not isinstance(config["patch_size"], int):
        problems.append("image_size and patch_size are not single numbers")
    fixed: dict[str, Any] = {
        "patch_size": config["patch_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "activation": _ACTIVATIONS.get(config["hidden_act"]),
        "pixel_norm": "clip" if clip else "half",
        "class_token": clip,
        "patch_bias": not clip,
        "pre_norm": clip,
        "norm_eps": config["layer_norm_eps"],
    }
    free: dict[str, Any] = {"image_size": (config["image_size"],) * 2}
    if whole is None:
        free["final_norm"] = not clip
    else:
        fixed |= {"final_norm": False, "select_layer": _select_layer(whole, config["num_hidden_layers"], problems)}
        if whole.get("vision_feature_select_strategy", "default") != ("default" if clip else "full"):
            problems.append("vision_feature_select_strategy sends the class token to the connector, or cuts a patch")
    _refuse(problems, where)
    return Described(family, fixed, free)


def _select_layer(whole: Json, layers: int, problems: list[str]) -> int:
    """Layer whose output LLaVA takes, counted from the end; the first hidden state is the embedding."""
    layer = whole.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        problems.append(f"vision_feature_layer {layer} joins several layers")
        return -1
    return layer if layer < 0 else layer - layers - 1


def _connector(family: str, whole: Json, where: Path) -> Described:
    """LLaVA's projector: two linear layers around a GELU."""
    problems = []
    if (activation := whole.get("projector_hidden_act", "gelu")) != "gelu":
        problems.append(f"projector_hidden_act {activation!r} is not 'gelu'")
    if not whole.get("multimodal_projector_bias", True):
        problems.append("multimodal_projector_bias is false")
    _refuse(problems, where)
    return Described(family, {"kind": "mlp"})


def _decoder(family: str, given: Json, where: Path) -> Described:
    """A language model."""
    config = {**_DECODER_SHARED, **_DECODER_DEFAULTS[family], **given}
    heads = config["num_attention_heads"]
    problems = [
        f"{key} is {config[key]!r}, not {plain!r}"
        for key, plain in (
            ("hidden_act", "silu"),
            ("mlp_bias", False),
            ("clip_qkv", None),
            ("partial_rotary_factor", 1.0),
        )
        if config.get(key, plain) != plain
    ]
    if family != "qwen2" and config.get("attention_bias", False):
        problems.append("attention_bias is true, which puts a bias on o_proj")
    fixed: dict[str, Any] = {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "intermediate_size": config["intermediate_size"],
        "norm": "rms",
        "norm_eps": config["rms_norm_eps"],
        "rope": True,
        "qk_norm": family in ("qwen3", "qwen3_moe", "olmoe"),
        "qk_norm_over": "all" if family == "olmoe" else "head",
        "attention_bias": family == "qwen2",
        "tied": config.get("tie_word_embeddings", False),
        "sliding_window": _window(family, config),
        **_rope(config, problems),
        **_experts(family, config, problems),
    }
    _refuse(problems, where)
    return Described(family, fixed, {"vocab_size": config["vocab_size"]})


def _rope(config: Json, problems: list[str]) -> dict[str, Any]:
    """Rotary keys, from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    if kind == "default":
        return found | {"rope_scaling.factor": 1.0}
    if kind not in ("linear", "llama3"):
        problems.append(f"rope_type {kind!r} is none of default, linear, llama3")
        return found
    found |= {"rope_scaling.kind": kind, "rope_scaling.factor": float(rope["factor"])}
    if kind == "llama3":
        found |= {f"rope_scaling.{key}": float(rope[key]) for key in ("low_freq_factor", "high_freq_factor")}
        found["rope_scaling.original_length"] = rope["original_max_position_embeddings"]
    return found


def _experts(family: str, config: Json, problems: list[str]) -> dict[str, Any]:
    """Experts of a sparse family; a dense one leaves the recipe free to have some."""
    if family not in ("mixtral", "qwen3_moe", "olmoe"):
        return {}
    step, alone = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if alone:
        problems.append(f"mlp_only_layers {alone} are dense out of turn")
    width, dense = config.get("moe_intermediate_size", config["intermediate_size"]), config["intermediate_size"]
    if step == 1:
        dense = width  # there is no dense MLP
    elif dense % width:
        problems.append(f"intermediate_size {dense} is no multiple of moe_intermediate_size {width}")
    return {
        "intermediate_size": dense,
        "moe.granularity": dense // width,
        "moe.shared": 0,
        "moe.routed_scale": 1.0,
        "moe.num_experts": config.get("num_experts", config["num_local_experts"]),
        "moe.top_k": config["num_experts_per_tok"],
        "moe.every": step,
        "moe.renormalize": True if family == "mixtral" else config.get("norm_topk_prob", False),
    }


def _window(family: str, config: Json) -> int:
    """Positions of the sliding window, where the checkpoint uses one; 0 for none."""
    if family in ("llama", "olmoe") or (family.startswith("qwen") and not config.get("use_sliding_window", False)):
        return 0
    return config.get("sliding_window") or 0
