"""The decoder against Hugging Face's Llama and Qwen, packed documents against lone ones, and the cache."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from mmtrain.config.schema import Decoder as DecoderConfig
from mmtrain.config.schema import RopeScaling
from mmtrain.model.attention import KVCache
from mmtrain.model.decoder import Decoder
from mmtrain.mup.roles import Scales
from tests.model.small import DECODER, fill

LENGTH = 40
SHARED = {
    "vocab_size": 128,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
    "rms_norm_eps": 1e-4,
    "attn_implementation": "eager",
}
CONFIG = replace(DECODER, vocab_size=128, norm_eps=1e-4)
STRETCH = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TWINS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHARED), CONFIG),
    "llama3 rope": (
        LlamaForCausalLM,
        LlamaConfig(**SHARED, rope_parameters=STRETCH),
        replace(CONFIG, rope_theta=500.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32)),
    ),
    "llama tied": (LlamaForCausalLM, LlamaConfig(**SHARED, tie_word_embeddings=True), replace(CONFIG, tied=True)),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**SHARED, use_sliding_window=False),
        replace(CONFIG, attention_bias=True, head_dim=10),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHARED), replace(CONFIG, qk_norm=True)),
}


def made(config: DecoderConfig, seed: int = 0) -> Decoder:
    return fill(Decoder(config, Scales(), recompute=False), seed)


def renamed(name: str) -> str:
    """Our name of a tensor -> Hugging Face's."""
    for ours, theirs in (
        ("embedding.", "model.embed_tokens."),
        ("blocks.", "model.layers."),
        ("norm1.", "input_layernorm."),
        ("norm2.", "post_attention_layernorm."),
        ("attention.out.", "self_attn.o_proj."),
        ("attention.q_norm", "self_attn.q_norm"),
        ("attention.k_norm", "self_attn.k_norm"),
        ("attention.", "self_attn."),
        (".q.", ".q_proj."),
        (".k.", ".k_proj."),
        (".v.", ".v_proj."),
        (".up.", ".up_proj."),
        (".gate.", ".gate_proj."),
        (".down.", ".down_proj."),
        ("head.", "lm_head."),
    ):
        if ours == "attention." and "self_attn" in name:
            continue
        name = name.replace(ours, theirs)
    return f"model.{name}" if name == "norm.weight" else name


@pytest.mark.parametrize("which", TWINS)
def test_logits_are_those_of_hugging_face(which: str) -> None:
    cls, config, ours = TWINS[which]
    if which == "qwen2":  # it has no head_dim of its own
        config.head_dim = 10
    decoder, twin = made(ours), cls(config).eval()
    missing = twin.load_state_dict({renamed(name): value for name, value in decoder.state_dict().items()}, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    tokens = torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(2, -1)
    hidden, _ = decoder(decoder.embedding(tokens), positions, torch.zeros_like(tokens), None)
    with torch.no_grad():
        want = twin(input_ids=tokens).logits
    torch.testing.assert_close(decoder.head(hidden), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [DECODER, replace(DECODER, norm="crms", rope=False, qk_norm=True)])
def test_a_packed_document_computes_what_it_computes_alone(config: DecoderConfig) -> None:
    decoder = made(config)
    lengths = [5, 9, 1, 6]
    x = torch.randn(1, 25, config.hidden_size, generator=torch.Generator().manual_seed(2), requires_grad=True)
    ids = torch.full((1, 25), -1)
    positions = torch.zeros(1, 25, dtype=torch.int64)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        ids[0, start : start + length] = number
        positions[0, start : start + length] = torch.arange(length)
    packed, _ = decoder(x, positions, ids, None)
    assert torch.isfinite(packed).all()
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = slice(start, start + length)
        alone, _ = decoder(
            x[:, own], torch.arange(length).unsqueeze(0), torch.zeros(1, length, dtype=torch.int64), None
        )
        torch.testing.assert_close(packed[:, own], alone, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(packed[:, own].square().sum(), x, retain_graph=True)
        assert (gradient[ids != number] == 0).all() and (gradient[0, own] != 0).any(-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_the_cache_equals_the_whole_forward(side: str) -> None:
    decoder = made(replace(DECODER, qk_norm=True))
    prompts, steps = [6, 3, 8], 4
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randn(length + steps, DECODER.hidden_size, generator=draw) for length in prompts]
    width = max(prompts)
    x, ids = torch.zeros(3, width, DECODER.hidden_size), torch.full((3, width), -1)
    positions = torch.zeros(3, width, dtype=torch.int64)
    for row, length in enumerate(prompts):
        own = slice(width - length, width) if side == "left" else slice(0, length)
        x[row, own], ids[row, own], positions[row, own] = rows[row][:length], 0, torch.arange(length)
    cache = KVCache(DECODER.num_layers, width + steps)
    with torch.no_grad():
        outs = [decoder(x, positions, ids, None, cache)[0]]
        for step in range(steps):
            new = torch.stack([rows[row][length + step] for row, length in enumerate(prompts)]).unsqueeze(1)
            at = torch.tensor([[length + step] for length in prompts])
            outs.append(decoder(new, at, torch.zeros_like(at), None, cache)[0])
        for row, length in enumerate(prompts):
            own = slice(width - length, width) if side == "left" else slice(0, length)
            got = torch.cat([outs[0][row, own], *(out[row] for out in outs[1:])])
            whole = torch.arange(length + steps).unsqueeze(0)
            want, _ = decoder(rows[row].unsqueeze(0), whole, torch.zeros_like(whole), None)
            torch.testing.assert_close(got, want[0], rtol=1e-5, atol=1e-5)


def test_the_attention_scale_is_the_one_given() -> None:
    plain, scaled = made(DECODER), fill(Decoder(DECODER, Scales(attention_decoder=0.01), recompute=False))
    assert plain.blocks[0].attention.scale == DECODER.head_dim**-0.5
    assert {block.attention.scale for block in scaled.blocks} == {0.01}
