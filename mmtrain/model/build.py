"""What a model config amounts to, without building its weights: parameters, active parameters, FLOPs."""

from typing import NamedTuple

import torch

from mmtrain.config.schema import PARTS, Model
from mmtrain.model.vlm import VisionLanguageModel

PRODUCTS = ("matrix", "router")


class Count(NamedTuple):
    """Parameters of a part or of the whole model."""

    total: int
    active: int
    """Those that one token meets: top_k of each sparse layer's experts."""


def meta_model(model: Model) -> VisionLanguageModel:
    """The model on the meta device: names, shapes and roles without memory."""
    with torch.device("meta"):
        return VisionLanguageModel(model)


def parameter_counts(model: Model) -> dict[str, Count]:
    """Counts of "vision", "connector", "decoder" and "all"; rows that only pad the vocabulary are left out."""
    totals = dict.fromkeys(PARTS, 0)
    active = dict.fromkeys(PARTS, 0.0)
    padding = model.decoder.padded_vocab() - model.decoder.vocab_size
    for name, parameter in meta_model(model).named_parameters():
        part = name.partition(".")[0]
        size = parameter.numel()
        if name in ("decoder.embedding.weight", "decoder.head.weight"):
            size -= padding * model.decoder.hidden_size
        totals[part] += size
        active[part] += size * _active_share(model, part, name)
    counts = {part: Count(totals[part], round(active[part])) for part in PARTS}
    counts["all"] = Count(*(sum(column) for column in zip(*counts.values(), strict=True)))
    return counts


def _active_share(model: Model, part: str, name: str) -> float:
    """Share of a parameter's entries that one token meets."""
    moe = getattr(model, part).moe
    return moe.top_k / moe.num_experts if ".experts." in name else 1.0


class Flops(NamedTuple):
    """Floating-point operations of forward and backward (3 x forward), by what they are proportional to.

    Active experts only, nothing recomputed. A matrix product of [a, b] with a vector counts 2ab, attention 4 * visible
    positions * heads * head size a layer. Norms, activations, convolutions over 3x3 cells and the routers' top-k are
    left out (under 1 %).
    """

    token: float
    """Of a decoder position, image tokens included, besides attention."""
    image: float
    """Of an image in the towers."""
    target: float
    """Of a position whose logits are needed."""
    pair: float
    """Of a decoder position that attends to another."""

    @classmethod
    def of(cls, model: Model) -> "Flops":
        """Those of a model; builds it on the meta device, so make it once."""
        vision, decoder = model.vision, model.decoder
        rows, columns = vision.grid()
        patches = rows * columns
        seen = patches + int(vision.class_token)
        uses = {"vision": seen, "connector": model.connector.num_tokens, "decoder": 1}
        parts = dict.fromkeys(uses, 0.0)
        for name, parameter in meta_model(model).named_parameters():
            part = name.partition(".")[0]
            count = uses[part]
            if name.startswith(("vision.patch", "connector.stage1", "connector.attention.k", "connector.attention.v")):
                count = patches
            if parameter.role.kind in PRODUCTS or name == "vision.patch.weight":
                parts[part] += 2.0 * parameter.numel() * _active_share(model, part, name) * count
        image = parts["vision"] + parts["connector"] + 4.0 * vision.built_layers() * vision.hidden_size * seen * seen
        if model.connector.kind == "attention_pool":
            image += 4.0 * model.connector.hidden_size * model.connector.num_tokens * patches
        target = 2.0 * decoder.vocab_size * decoder.hidden_size
        pair = 4.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim
        return cls(3.0 * parts["decoder"], 3.0 * image, 3.0 * target, 3.0 * pair)

    def step(self, tokens: float, images: float, targets: float, context: float) -> float:
        """Those of a step.

        context: mean number of positions that a decoder position attends to ((length + 1) / 2 of a lone document)
        """
        return self.token * tokens + self.image * images + self.target * targets + self.pair * context * tokens
