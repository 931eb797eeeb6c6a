"""Small real models, wider than their base in every part, on the meta device."""

from dataclasses import replace

import torch

from mmtrain.config.schema import Connector, Decoder, Model, Moe, Vision
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.roles import Scales

KINDS = ("c_abstractor", "avg_pool", "attention_pool", "mlp")
BASE = {
    "vision": {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32},
    "connector": {"hidden_size": 24, "num_heads": 2},
    "decoder": {"hidden_size": 32, "num_heads": 4, "head_dim": 8, "intermediate_size": 48},
}


def config(kind: str = "c_abstractor", experts: int = 0, tied: bool = False, rich: bool = False) -> Model:
    """A small model, wider than BASE in every part. rich: every optional weight (biases, norms) is there."""
    moe = Moe(num_experts=experts)
    return Model(
        vision=Vision(
            image_size=(28, 28),
            patch_size=7,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            intermediate_size=128,
            patch_bias=rich,
            class_token=not rich,
            pre_norm=not rich,
            final_norm=rich,
            moe=moe,
        ),
        connector=Connector(
            kind=kind, num_tokens=16 if kind == "mlp" else 4, hidden_size=48, depth=2, num_heads=2, moe=moe
        ),
        decoder=Decoder(
            vocab_size=200,
            hidden_size=128,
            num_layers=2,
            num_heads=8,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=144,
            norm="layer" if rich else "rms",
            qk_norm=rich,
            attention_bias=rich,
            tied=tied,
            moe=replace(moe, every=2),
        ),
    )


def meta(model: Model, scales: Scales = Scales()) -> VisionLanguageModel:  # noqa: B008
    with torch.device("meta"):
        return VisionLanguageModel(model, scales)
