"""Which Hugging Face tensors make up each of ours, and the other way round: one table for both directions.

Values are never changed, only joined (experts into one tensor) or given a dimension (the class token), so that a round
trip is exact.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mmtrain.config.schema import Decoder, Vision


@dataclass(frozen=True)
class Origin:
    """The tensors that make up one of ours."""

    names: tuple[str, ...]
    """Hugging Face's names."""
    experts: bool = False
    """Whether they are the experts, one each, along our dimension 0."""
    row: bool = False
    """Whether the one tensor is our only row."""


Table = dict[str, Origin]
"""Our name -> its origin."""

_BLOCK = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
}
_BIASES = {f"attention.{ours}.bias": f"self_attn.{ours}_proj.bias" for ours in "qkv"}
_QK_NORMS = {f"attention.{ours}_norm.weight": f"self_attn.{ours}_norm.weight" for ours in "qk"}
_MLP = {f"mlp.{ours}.weight": f"mlp.{ours}_proj.weight" for ours in ("gate", "up", "down")}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}

_TOWER_BLOCK = {
    **{f"norm{n}.{kind}": f"layer_norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")},
    **{f"attention.{ours}.{kind}": f"self_attn.{ours}_proj.{kind}" for ours in "qkv" for kind in ("weight", "bias")},
    **{f"attention.out.{kind}": f"self_attn.out_proj.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.up.{kind}": f"mlp.fc1.{kind}" for kind in ("weight", "bias")},
    **{f"mlp.down.{kind}": f"mlp.fc2.{kind}" for kind in ("weight", "bias")},
}


def decoder_table(decoder: Decoder, family: str, body: str = "model.", head: str = "lm_head.") -> Table:
    """Every tensor of a decoder. body, head: what their names begin with."""
    table = {
        "decoder.embedding.weight": Origin((f"{body}embed_tokens.weight",)),
        "decoder.norm.weight": Origin((f"{body}norm.weight",)),
    }
    if not decoder.tied:
        table["decoder.head.weight"] = Origin((f"{head}weight",))
    shared = {**_BLOCK, **(_BIASES if decoder.attention_bias else {}), **(_QK_NORMS if decoder.qk_norm else {})}
    for layer in range(decoder.num_layers):
        ours, theirs = f"decoder.blocks.{layer}.", f"{body}layers.{layer}."
        sparse = decoder.moe.is_sparse(layer)
        names = shared if sparse else {**shared, **_MLP}
        table |= {ours + name: Origin((theirs + other,)) for name, other in names.items()}
        if sparse:
            table |= _experts(ours, theirs, family, decoder.moe.num_experts)
    return table


def _experts(ours: str, theirs: str, family: str, count: int) -> Table:
    """Router and experts of one layer."""
    block = theirs + ("block_sparse_moe." if family == "mixtral" else "mlp.")
    table = {f"{ours}mlp.router.weight": Origin((f"{block}gate.weight",))}
    for kind in ("up", "gate", "down"):
        last = _MIXTRAL[kind] if family == "mixtral" else f"{kind}_proj"
        names = tuple(f"{block}experts.{expert}.{last}.weight" for expert in range(count))
        table[f"{ours}mlp.experts.{kind}"] = Origin(names, experts=True)
    return table


def vision_table(vision: Vision, layers: int, body: str = "vision_model.") -> Table:
    """Every tensor of a CLIP or SigLIP tower of `layers` layers."""
    table = {
        "vision.patch.weight": Origin((f"{body}embeddings.patch_embedding.weight",)),
        "vision.positions": Origin((f"{body}embeddings.position_embedding.weight",)),
    }
    if vision.patch_bias:
        table["vision.patch.bias"] = Origin((f"{body}embeddings.patch_embedding.bias",))
    if vision.class_token:
        table["vision.class_token"] = Origin((f"{body}embeddings.class_embedding",), row=True)
    for kind in ("weight", "bias"):
        if vision.pre_norm:
            table[f"vision.pre_norm.{kind}"] = Origin((f"{body}pre_layrnorm.{kind}",))  # so spelt in every CLIP
        if vision.final_norm:
            table[f"vision.final_norm.{kind}"] = Origin((f"{body}post_layernorm.{kind}",))
    for layer in range(layers):
        for ours, theirs in _TOWER_BLOCK.items():
            table[f"vision.blocks.{layer}.{ours}"] = Origin((f"{body}encoder.layers.{layer}.{theirs}",))
    return table


def connector_table(body: str = "multi_modal_projector.") -> Table:
    """LLaVA's projector."""
    return {
        f"connector.mlp.{ours}.{kind}": Origin((f"{body}{theirs}.{kind}",))
        for ours, theirs in (("up", "linear_1"), ("down", "linear_2"))
        for kind in ("weight", "bias")
    }


ANCHORS = {
    "vision": "embeddings.patch_embedding.weight",
    "connector": "linear_1.weight",
    "decoder": "embed_tokens.weight",
}
"""Part -> end of the name of a tensor that it has exactly once: what stands before is the prefix of the part."""

LEFT_OUT = {
    "vision": re.compile(r"(post_layernorm\.(weight|bias)|head\..+|embeddings\.position_ids)"),
    "connector": re.compile(r"(?!)"),
    "decoder": re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq|lm_head\.weight"),
}
"""Part -> tensors behind its prefix that it never reads: CLIP's norm and SigLIP's head over a pooled vector, constants
that old versions saved, a head that repeats the embedding."""

_TWO_TOWERS = re.compile(r"vision_model\.|text_model\.|visual_projection\.|text_projection\.|logit_(scale|bias)$")
_LLAVA = re.compile(r"(model\.)?(language_model\.|vision_tower\.|multi_modal_projector\.)|lm_head\.weight$")
OTHER_PARTS = {"clip": _TWO_TOWERS, "siglip": _TWO_TOWERS, "llava": _LLAVA, "llava_next": _LLAVA}
"""model_type of a whole model -> tensors of the parts beside the one that is read."""

SEPARATOR = re.compile(r"(model\.)?image_newline")
"""LLaVA-NeXT's separator of an image's rows, read by no part: here the panels of an image follow each other without."""


def prefix_of(part: str, names: Iterable[str]) -> str | None:
    """What the part's names begin with in a checkpoint; None when it is not there."""
    found = [name.removesuffix(ANCHORS[part]) for name in names if name.endswith(ANCHORS[part])]
    return found[0] if found else None
