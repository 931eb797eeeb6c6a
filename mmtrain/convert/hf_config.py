"""config.json of an exported folder, and which class of transformers a model fits. The inverse of config.pretrained."""

from dataclasses import asdict
from typing import Any

from mmtrain.config.schema import Decoder, Model, Recipe, Vision
from mmtrain.data.chat import IMAGE_MARK
from mmtrain.data.image import Canvas
from mmtrain.data.tokenizer import Tokenizer

Json = dict[str, Any]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "llava": "LlavaForConditionalGeneration",
}
"""model_type -> class of transformers."""

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

POSITIONS = 1 << 15
"""max_position_embeddings: rotary positions have no end; a number must stand there all the same."""


def decoder_family(decoder: Decoder, biased: bool) -> tuple[str, list[str]]:
    """(family that holds this decoder, reasons why none does). biased: whether router biases are not zero."""
    reasons = []
    if decoder.norm != "rms" or not decoder.rope:
        reasons.append(f"a decoder with norm {decoder.norm} and rope={str(decoder.rope).lower()} has no public class")
    if biased:
        reasons.append("its routers have learnt biases (balance: bias), which no public class has")
    over = decoder.qk_norm_over if decoder.qk_norm else ""
    if decoder.attention_bias and over:
        reasons.append("query biases and q/k norms together have no public class")
    square = decoder.head_dim * decoder.num_heads == decoder.hidden_size
    if decoder.moe.num_experts == 0:
        if over == "all":
            reasons.append("a dense decoder with a q/k norm over all heads has no public class")
        family = "qwen3" if over else "qwen2" if decoder.attention_bias else "llama"
        if family == "llama" and decoder.sliding_window:
            family = "mistral"
    else:
        if decoder.attention_bias:
            reasons.append("experts and query biases together have no public class")
        if decoder.moe.shared:
            reasons.append("a shared expert beside routed ones has no public class here")
        family = {"": "mixtral", "head": "qwen3_moe", "all": "olmoe"}[over]
        if family != "qwen3_moe" and decoder.moe.every != 1:
            reasons.append(f"{family} has experts in every layer, this model in every {decoder.moe.every}.")
        if family == "mixtral" and not decoder.moe.renormalize:
            reasons.append("mixtral's gates sum to 1, this model's do not")
    if family in ("qwen2", "olmoe") and not square:
        reasons.append(f"{family} has heads of hidden_size / num_heads, this model of {decoder.head_dim}")
    if decoder.sliding_window and family == "olmoe":
        reasons.append("olmoe has no sliding window")
    return family, reasons


def llava_reasons(model: Model, biased: bool) -> list[str]:
    """Why the model is none of LLaVA's class; empty when it is."""
    vision, connector = model.vision, model.connector
    reasons = decoder_family(model.decoder, biased)[1]
    if connector.kind != "mlp":
        reasons.append(f"LLaVA's connector is an mlp, this one is a {connector.kind}")
    sparse = [part for part in ("vision", "connector") if getattr(model, part).moe.num_experts]
    if sparse:
        reasons.append(f"LLaVA has no experts in {' and '.join(sparse)}")
    clip = (vision.class_token, vision.pre_norm, not vision.patch_bias, vision.pixel_norm == "clip")
    if not all(clip) and any(clip):
        reasons.append("the tower is neither CLIP's nor SigLIP's")
    if vision.final_norm:
        reasons.append("LLaVA takes features before the tower's last norm, this model behind it")
    if vision.image_size[0] != vision.image_size[1]:
        reasons.append(f"LLaVA's canvas is square, this one is {vision.image_size[0]} x {vision.image_size[1]}")
    return reasons


def decoder_config(decoder: Decoder, family: str, tokenizer: Tokenizer, dtype: str) -> Json:
    """config.json of a language model."""
    scaling = decoder.rope_scaling
    rope: Json = {"rope_theta": decoder.rope_theta, "rope_type": "default"}
    if scaling.factor != 1.0:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope["original_max_position_embeddings"] = scaling.original_length
    old = {key: value for key, value in rope.items() if key != "rope_theta"} if scaling.factor != 1.0 else None
    config: Json = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "intermediate_size": decoder.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_parameters": rope,
        "rope_theta": decoder.rope_theta,  # both spellings: transformers 5 reads the one above, older readers these
        "rope_scaling": old,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": decoder.tied,
        "bos_token_id": None,
        "eos_token_id": sorted(tokenizer.end_ids()),
        "pad_token_id": tokenizer.pad_id,
    }
    if family in ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
        config["sliding_window"] = decoder.sliding_window or None
    if family.startswith("qwen"):
        config["use_sliding_window"] = decoder.sliding_window > 0
        config["max_window_layers"] = 0
    if decoder.moe.num_experts:
        width = decoder.moe.expert_width(decoder.intermediate_size)
        if family != "qwen3_moe":
            config["intermediate_size"] = width
        key = "num_local_experts" if family == "mixtral" else "num_experts"
        config |= {key: decoder.moe.num_experts, "num_experts_per_tok": decoder.moe.top_k}
    if family in ("qwen3_moe", "olmoe"):
        config["norm_topk_prob"] = decoder.moe.renormalize
    if family == "qwen3_moe":
        config |= {"decoder_sparse_step": decoder.moe.every, "moe_intermediate_size": width}
    return config


def vision_config(vision: Vision) -> Json:
    """vision_config of LLaVA: the tower as far as it is built."""
    return {
        "model_type": "clip_vision_model" if vision.class_token else "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.built_layers(),
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size,
        "hidden_act": _ACTIVATIONS[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        **({} if vision.class_token else {"vision_use_head": False}),
    }


def llava_config(recipe: Recipe, family: str, tokenizer: Tokenizer, dtype: str) -> Json:
    """config.json of a tower, an MLP connector and a decoder."""
    model = recipe.model
    return {
        "architectures": [ARCHITECTURES["llava"]],
        "model_type": "llava",
        "dtype": dtype,
        "text_config": decoder_config(model.decoder, family, tokenizer, dtype),
        "vision_config": vision_config(model.vision),
        "image_token_index": tokenizer.image_id,
        "image_seq_length": model.connector.num_tokens,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,  # the tower ends where select_layer cut it
        "vision_feature_select_strategy": "default" if model.vision.class_token else "full",
        "tie_word_embeddings": model.decoder.tied,
        "eos_token_id": sorted(tokenizer.end_ids()),
        "pad_token_id": tokenizer.pad_id,
    }


def own_config(recipe: Recipe, scales: Json, chat: Json, pixels: Json, tokenizer: Tokenizer, dtype: str) -> Json:
    """config.json for modeling_mmtrain.py."""
    parts = {part: asdict(getattr(recipe.model, part)) for part in ("vision", "connector", "decoder")}
    for part in parts.values():
        part.pop("pretrained")
    module = "modeling_mmtrain"
    return {
        "architectures": ["MmtrainForConditionalGeneration"],
        "model_type": "mmtrain",
        "auto_map": {
            "AutoConfig": f"{module}.MmtrainConfig",
            "AutoModelForImageTextToText": f"{module}.MmtrainForConditionalGeneration",
        },
        "dtype": dtype,
        "parts": parts,
        "data": {"resize": recipe.data.resize, "sub_images": recipe.data.sub_images, **pixels},
        "scales": scales,
        "chat": chat,
        "image_token_id": tokenizer.image_id,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": sorted(tokenizer.end_ids()),
        "pad_token_id": tokenizer.pad_id,
    }


def image_processor(canvas: Canvas, pixels: Json) -> Json | None:
    """preprocessor_config.json of LLaVA; None where its processors resize in no such way."""
    if canvas.sub_images or canvas.resize == "pad":
        return None
    size = {"height": canvas.height, "width": canvas.width}
    crop = canvas.resize == "shortest_crop"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": canvas.height} if crop else size,
        "do_center_crop": crop,
        "crop_size": size,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(pixels["mean"]),
        "image_std": list(pixels["std"]),
    }


def processor(recipe: Recipe) -> Json:
    """processor_config.json of LLaVA: how many placeholders an image becomes."""
    clip = recipe.model.vision.class_token
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": recipe.model.vision.patch_size,
        "num_additional_image_tokens": int(clip),
        "vision_feature_select_strategy": "default" if clip else "full",
        "image_token": IMAGE_MARK,
    }
