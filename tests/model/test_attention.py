"""Attention, rotary positions, masks and the cache against slow twins."""

import math

import pytest
import torch

from mmtrain.config.schema import RopeScaling
from mmtrain.model.attention import Attention, KVCache, View, document_mask, make_rope, rope_frequencies
from tests.model.small import fill


def naive(attention: Attention, x, memory, heads: int, kv_heads: int, mask=None, scale=None) -> torch.Tensor:
    """One head and one query at a time."""
    dim = attention.head_dim
    q, k, v = attention.q(x), attention.k(memory), attention.v(memory)
    out = torch.zeros(*x.shape[:2], heads * dim)
    for b in range(x.shape[0]):
        for head in range(heads):
            own = slice(head * dim, (head + 1) * dim)
            group = head // (heads // kv_heads)
            shared = slice(group * dim, (group + 1) * dim)
            scores = q[b, :, own] @ k[b, :, shared].t() * (dim**-0.5 if scale is None else scale)
            if mask is not None:
                scores = scores.masked_fill(~mask[b], -torch.inf)
            out[b, :, own] = scores.softmax(-1) @ v[b, :, shared]
    return attention.out(out)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_grouped_attention_is_the_naive_one(heads: int, kv_heads: int, scale: float | None) -> None:
    attention = fill(Attention(24, heads, kv_heads, 6, scale, qkv_bias=True, out_bias=True))
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(attention(x), naive(attention, x, x, heads, kv_heads, scale=scale))


def test_cross_attention_reads_the_memory() -> None:
    attention = fill(Attention(24, 4, 4, 6, None, True, True, d_memory=10))
    x, memory = torch.randn(2, 3, 24), torch.randn(2, 9, 10)
    torch.testing.assert_close(attention(x, memory=memory), naive(attention, x, memory, 4, 4))


IDS = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 0, 0]])


def may_look(ids: list[int], query: int, key: int) -> bool:
    return key == query or (ids[key] == ids[query] != -1 and key <= query)


def test_a_query_sees_its_own_document_up_to_itself() -> None:
    mask = document_mask(IDS, IDS, 0, torch.float32)
    assert mask.shape == (2, 1, 7, 7)
    for row, ids in enumerate(IDS.tolist()):
        for query in range(7):
            for key in range(7):
                assert mask[row, 0, query, key].item() == (0.0 if may_look(ids, query, key) else -math.inf)


def test_masked_attention_is_the_naive_one_and_padding_gives_no_nan() -> None:
    attention = fill(Attention(24, 4, 2, 6, None, False, False))
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[[may_look(ids, q, k) for k in range(7)] for q in range(7)] for ids in IDS.tolist()])
    got = attention(x, View(document_mask(IDS, IDS, 0, x.dtype)))
    torch.testing.assert_close(got, naive(attention, x, x, 4, 2, mask))
    assert torch.isfinite(got).all()


def rotated(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """One head's vector as complex numbers (x_i, x_{i + half}), turned."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * theta ** (-2 * i / x.shape[-1]) for i in range(half)])
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat((turned.real, turned.imag))


def test_rope_turns_pairs_by_position() -> None:
    positions = torch.tensor([[0, 1, 5, 100]])
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(1))
    frequencies = rope_frequencies(8, 500.0, RopeScaling(), x.device)
    got = make_rope(positions, frequencies, x.dtype).rotate(x)
    for slot, position in enumerate(positions[0].tolist()):
        for head in range(2):
            torch.testing.assert_close(got[0, slot, head], rotated(x[0, slot, head], position, 500.0))


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    plain = rope_frequencies(64, 500000.0, RopeScaling(), torch.device("cpu"))
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=1024)
    scaled = rope_frequencies(64, 500000.0, scaling, torch.device("cpu"))
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 1024 / 4, wavelengths > 1024
    assert short.any() and long.any() and (~short & ~long).any()
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = (scaled / plain)[~short & ~long]
    assert ((between < 1) & (between > 1 / 8)).all() and (between.diff() <= 0).all()


def test_the_cache_returns_what_it_was_given_in_call_order() -> None:
    cache = KVCache(num_layers=2, capacity=5)
    first, second = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8)
    assert cache.begin(torch.tensor([[-1, 0, 0, 0], [0, 0, 0, -1]])).shape == (2, 4)
    for layer in range(2):
        key, value = cache.extend(layer, first, first + 1)
        assert torch.equal(key, first) and torch.equal(value, first + 1)
    ids = cache.begin(torch.tensor([[0], [0]]))
    assert ids.tolist() == [[-1, 0, 0, 0, 0], [0, 0, 0, -1, 0]]
    key, value = cache.extend(1, second, second)
    assert torch.equal(key, torch.cat((first, second), 2)) and torch.equal(value[:, :, 4:], second)
    with pytest.raises(ValueError, match="KV cache of 5 slots cannot hold 6: build it larger"):
        cache.begin(torch.tensor([[0], [0]]))
