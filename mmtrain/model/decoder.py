"""Language model: a pre-norm causal transformer of the Llama / Mistral / Qwen family.

Letters: B packs, T positions, d width.
"""

import torch
from torch import nn

from mmtrain.config.schema import Decoder as DecoderConfig
from mmtrain.model.attention import Attention, KVCache, View, document_mask, make_rope, rope_frequencies
from mmtrain.model.block import Block, feed_forward, run_blocks
from mmtrain.model.loss import LanguageHead
from mmtrain.model.norm import decoder_norm
from mmtrain.model.parameter import EMBEDDING_STD
from mmtrain.model.stepio import PartRouterInput, RouterStats
from mmtrain.mup.roles import Role, Scales, declare


def token_embedding(decoder: DecoderConfig) -> nn.Embedding:
    """An empty nn.Embedding with its role; nn.Embedding itself would draw values from the global generator."""
    rows, width = decoder.padded_vocab(), decoder.hidden_size
    device = torch.get_default_device()
    with torch.device("meta"):
        layer = nn.Embedding(rows, width)
    layer.to_empty(device=device)
    declare(layer.weight, Role("input", None, width, std=EMBEDDING_STD, rows=decoder.vocab_size))
    return layer


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head. `embedding` and `head` are called by the model around `forward`."""

    def __init__(self, decoder: DecoderConfig, scales: Scales, recompute: bool) -> None:
        super().__init__()
        d_model = decoder.hidden_size
        self.config = decoder
        self.embedding = token_embedding(decoder)
        self.blocks = nn.ModuleList(
            Block(
                decoder_norm(decoder.norm, d_model, decoder.norm_eps),
                Attention(
                    d_model,
                    decoder.num_heads,
                    decoder.num_kv_heads,
                    decoder.head_dim,
                    scales.attention_decoder,
                    qkv_bias=decoder.attention_bias,
                    out_bias=False,
                    qk_norm_eps=decoder.norm_eps if decoder.qk_norm else None,
                    qk_norm_over=decoder.qk_norm_over,
                ),
                decoder_norm(decoder.norm, d_model, decoder.norm_eps),
                feed_forward(
                    decoder.moe,
                    decoder.moe.is_sparse(layer),
                    d_model,
                    decoder.intermediate_size,
                    d_model,
                    "swiglu",
                    bias=False,
                ),
            )
            for layer in range(decoder.num_layers)
        )
        self.norm = decoder_norm(decoder.norm, d_model, decoder.norm_eps)
        tied = self.embedding.weight if decoder.tied else None
        self.head = LanguageHead(d_model, decoder.vocab_size, decoder.padded_vocab(), scales.output, tied)
        self.recompute = recompute

    def forward(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        document_ids: torch.Tensor,
        routers: PartRouterInput | None,
        cache: KVCache | None = None,
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """Normed hidden states of B packs.

        embeddings    [B, T, d]
        positions     [B, T] int64, position within the document
        document_ids  [B, T] int64, -1 for padding: attends to itself alone and is not seen by routers' losses
        cache         earlier keys and values; see KVCache for its contract
        returns       hidden [B, T, d] and the routers' report
        """
        rope = None
        if self.config.rope:
            frequencies = rope_frequencies(
                self.config.head_dim, self.config.rope_theta, self.config.rope_scaling, embeddings.device
            )
            rope = make_rope(positions, frequencies, embeddings.dtype)
        start = 0 if cache is None else cache.length
        slots = document_ids if cache is None else cache.begin(document_ids)
        view = View(document_mask(document_ids, slots, start, embeddings.dtype), rope, cache)
        x, reports = run_blocks(self.blocks, embeddings, view, document_ids >= 0, routers, self.recompute)
        return self.norm(x), reports
