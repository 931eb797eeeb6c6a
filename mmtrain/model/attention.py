"""Attention for all parts: grouped queries, rotary positions, isolation of packed documents, a cache for generation."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmtrain.config.schema import RopeScaling
from mmtrain.model.mlp import linear
from mmtrain.model.norm import RmsNorm


class Rope(NamedTuple):
    """Rotation of every position: x -> x * cos + roll(x, half) * sin."""

    cos: torch.Tensor
    """[B, T, 1, head_dim]."""
    sin: torch.Tensor
    """[B, T, 1, head_dim], its first half negated."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate [B, T, heads, head_dim] in Llama's layout: entry i turns with entry i + head_dim / 2."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> torch.Tensor:
    """Angular frequency of each pair, [head_dim / 2] fp32, with linear or Llama-3 scaling (arXiv:2407.21783).

    Linear stretches every wavelength by `factor`. Llama-3: those below original_length / high_freq_factor stay, those
    above original_length / low_freq_factor are stretched, those between are a linear mix in (original_length /
    wavelength).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponent
    if scaling.factor == 1.0:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_length * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def make_rope(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> Rope:
    """Rotations of `positions` [B, T]; angles in fp32, factors in `dtype`."""
    angles = (positions.unsqueeze(-1).float() * frequencies).unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    return Rope(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def document_mask(queries: torch.Tensor, keys: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [B, 1, T, S]: 0 where a query may look, -inf elsewhere.

    queries  [B, T] document ids of the queries, which stand in slots start .. start + T - 1
    keys     [B, S] document ids of all slots
    A query sees its own document up to itself; padding (-1) sees only itself, so no row is empty. Additive, because
    SDPA would turn a boolean mask into this in every layer anew.
    """
    slot = torch.arange(keys.shape[1], device=keys.device)
    own = slot[start : start + queries.shape[1]].unsqueeze(1)
    seen = (queries.unsqueeze(2) == keys.unsqueeze(1)) & (slot <= own) & (queries >= 0).unsqueeze(2)
    seen |= slot == own
    return torch.zeros(seen.shape, dtype=dtype, device=keys.device).masked_fill_(~seen, -math.inf).unsqueeze(1)


class KVCache:
    """Keys and values of everything that a decoder has read, for generation without gradients.

    Contract: call the decoder first with the whole prompts, padded on either side (document id -1 for padding), then
    with T = 1. Slots fill in call order; `positions` are given by the caller and need not equal slots. A query sees
    the slots of its own document id in its row, so a row's later tokens carry the document id of its prompt.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._start = 0
        self._document_ids: torch.Tensor | None = None
        self._layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def begin(self, document_ids: torch.Tensor) -> torch.Tensor:
        """Make room for [B, T] more slots; return the document ids [B, S] of all slots.

        Raises ValueError when the capacity is exceeded.
        """
        self._start, self.length = self.length, self.length + document_ids.shape[1]
        if self.length > self.capacity:
            raise ValueError(f"KV cache of {self.capacity} slots cannot hold {self.length}: build it larger")
        if self._document_ids is None:
            self._document_ids = document_ids.new_full((document_ids.shape[0], self.capacity), -1)
        self._document_ids[:, self._start : self.length] = document_ids
        return self._document_ids[:, : self.length]

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, T, head_dim] of one layer; return all its keys and values [B, heads, S, head_dim]."""
        stored = self._layers[layer]
        if stored is None:
            shape = (*key.shape[:2], self.capacity, key.shape[3])
            stored = self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        stored[0][:, :, self._start : self.length] = key
        stored[1][:, :, self._start : self.length] = value
        return stored[0][:, :, : self.length], stored[1][:, :, : self.length]


class View(NamedTuple):
    """What a block's attention may see, the same in all layers."""

    mask: torch.Tensor | None = None
    """[B, 1, T, S] additive, None for everything."""
    rope: Rope | None = None
    """Rotary positions of the T queries and new keys."""
    cache: KVCache | None = None
    """Earlier keys and values, None while training."""


EVERYTHING = View()


class Attention(nn.Module):
    """Grouped-query attention; with another `d_memory`, cross-attention into a memory of that width."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float | None,
        qkv_bias: bool,
        out_bias: bool,
        d_memory: int | None = None,
        qk_norm_eps: float | None = None,
        qk_norm_over: Literal["head", "all"] = "head",
    ) -> None:
        """scale: factor on q.k, None for head_dim ** -0.5. qk_norm_eps: RMSNorm on queries and keys, over what."""
        super().__init__()
        d_memory = d_memory or d_model
        self.q = linear(d_model, num_heads * head_dim, qkv_bias)
        self.k = linear(d_memory, num_kv_heads * head_dim, qkv_bias)
        self.v = linear(d_memory, num_kv_heads * head_dim, qkv_bias)
        self.out = linear(num_heads * head_dim, d_model, out_bias)
        self.q_norm = self.k_norm = None
        self.norm_whole = qk_norm_over == "all"
        if qk_norm_eps is not None:
            self.q_norm = RmsNorm(num_heads * head_dim if self.norm_whole else head_dim, qk_norm_eps)
            self.k_norm = RmsNorm(num_kv_heads * head_dim if self.norm_whole else head_dim, qk_norm_eps)
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.grouped = num_heads != num_kv_heads

    def forward(
        self, x: torch.Tensor, view: View = EVERYTHING, layer: int = 0, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, T, d_model], memory [B, S, d_memory] (x itself when None) -> [B, T, d_model]."""
        memory = x if memory is None else memory
        q, k = self.q(x), self.k(memory)
        if self.q_norm is not None and self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k))
        v = self.v(memory).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.q_norm is not None and not self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if view.rope is not None:
            q, k = view.rope.rotate(q), view.rope.rotate(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if view.cache is not None:
            k, v = view.cache.extend(layer, k, v)
        if self.grouped and q.is_cuda:  # its masked kernels want as many key heads as query heads
            k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=view.mask, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.out(mixed.transpose(1, 2).flatten(2))
