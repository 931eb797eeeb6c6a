"""Small random checkpoints of every family, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

VOCAB = 300
IMAGE_ID = 299

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

DECODERS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**BASE)),
    "llama3": (LlamaForCausalLM, LlamaConfig(**BASE, head_dim=12, rope_parameters=LLAMA3)),
    "smollm2": (LlamaForCausalLM, LlamaConfig(**BASE, tie_word_embeddings=True, rope_parameters=LINEAR)),
    "mistral": (MistralForCausalLM, MistralConfig(**BASE, sliding_window=128)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**BASE, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**BASE, head_dim=12)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**BASE, **EXPERTS)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=12, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "qwen3_moe_every_2": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**BASE, **EXPERTS, head_dim=12, decoder_sparse_step=2, moe_intermediate_size=24),
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**BASE, num_experts=4, num_experts_per_tok=2)),
}
SPARSE = ("mixtral", "qwen3_moe", "qwen3_moe_every_2", "olmoe")

TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TOWERS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**TOWER)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**TOWER)),
}

WHOLE: dict[str, Any] = {
    "text_config": LlamaConfig(**BASE),
    "vision_config": CLIPVisionConfig(**TOWER),
    "image_token_index": IMAGE_ID,
}
SIGLIP = WHOLE | {"vision_config": SiglipVisionConfig(**TOWER), "vision_feature_select_strategy": "full"}
WHOLES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llava": (LlavaForConditionalGeneration, LlavaConfig(**WHOLE)),
    "llava_siglip_tied": (
        LlavaForConditionalGeneration,
        LlavaConfig(
            **SIGLIP | {"text_config": Qwen2Config(**BASE, tie_word_embeddings=True)}, tie_word_embeddings=True
        ),
    ),
    "llava_mixtral": (
        LlavaForConditionalGeneration,
        LlavaConfig(**WHOLE | {"text_config": MixtralConfig(**BASE, **EXPERTS)}),
    ),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig(**WHOLE)),
}


def random_twin(kind: type[PreTrainedModel], config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of transformers with weights so large that every one of them matters."""
    config._attn_implementation = "eager"
    twin = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.normal_(std=0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    if getattr(config, "tie_word_embeddings", False):
        twin.tie_weights()
    return twin


def save(twin: PreTrainedModel, folder: Path, shard: str = "50GB") -> Path:
    """The model's folder, with a tokenizer whose 300 entries are the model's."""
    twin.save_pretrained(folder, max_shard_size=shard)
    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"</s>": 0, "<pad>": 1, **{letter: 2 + number for number, letter in enumerate(byte_level)}}
    vocab |= {f"<extra_{number}>": number for number in range(len(vocab), VOCAB - 1)}
    fast = FastTokenizer(models.BPE(vocab | {"<image>": IMAGE_ID}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    return folder


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Ids [rows, length] of ordinary text."""
    return torch.randint(2, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy_of(twin: PreTrainedModel, ids: torch.Tensor, count: int, **more: torch.Tensor) -> list[list[int]]:
    """transformers' greedy continuation of each row; nothing ends it."""
    twin.generation_config.eos_token_id = None
    out = twin.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=1, **more
    )
    return out[:, ids.shape[1] :].tolist()
