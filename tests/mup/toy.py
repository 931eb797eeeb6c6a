"""A hand-made model with one weight of every kind, and the muP table written out by name: no rule is shared."""

from dataclasses import dataclass

import torch
from torch import nn

from mmtrain.mup.roles import Role, declare


@dataclass(frozen=True)
class Widths:
    """Everything that a base may change; the defaults are the base of the tests."""

    vision: int = 16
    experts: int = 4
    expert_ffn: int = 24
    connector: int = 8
    decoder: int = 32
    kv: int = 8
    ffn: int = 40


FIXED = 12
VOCAB, PADDED = 100, 128


def toy(w: Widths, device: str = "meta") -> nn.Module:
    """A module without forward: parameters by canonical names, with roles."""
    norm = Role("vector", None, w.vision, init="ones")
    table = {
        "vision.patch.weight": ((w.vision, 3, 4, 4), Role("input", 48, w.vision)),
        "vision.positions": ((9, w.vision), Role("input", 9, w.vision, std=0.02)),
        "vision.blocks.0.norm1.weight": ((w.vision,), norm),
        "vision.blocks.0.attention.q.weight": ((w.vision, w.vision), Role("matrix", w.vision, w.vision)),
        "vision.blocks.0.mlp.router.weight": ((w.experts, w.vision), Role("router", w.vision, w.experts)),
        "vision.blocks.0.mlp.experts.up": (
            (w.experts, w.expert_ffn, w.vision),
            Role("matrix", w.vision, w.expert_ffn),
        ),
        "vision.blocks.0.mlp.experts.up_bias": (
            (w.experts, w.expert_ffn),
            Role("vector", None, w.expert_ffn, init="zeros"),
        ),
        "vision.blocks.0.mlp.experts.down": (
            (w.experts, w.vision, w.expert_ffn),
            Role("matrix", w.expert_ffn, w.vision),
        ),
        "connector.depthwise": ((w.connector, 1, 3, 3), Role("input", 9, w.connector)),
        "connector.shift": ((w.connector,), Role("input", 1, w.connector, std=0.5)),
        "connector.mlp.up.weight": ((w.connector, w.vision), Role("matrix", w.vision, w.connector)),
        "connector.mlp.down.weight": ((w.decoder, w.connector), Role("matrix", w.connector, w.decoder)),
        "decoder.embedding.weight": ((PADDED, w.decoder), Role("input", VOCAB, w.decoder, std=0.02, rows=VOCAB)),
        "decoder.blocks.0.attention.k.weight": ((w.kv, w.decoder), Role("matrix", w.decoder, w.kv)),
        "decoder.blocks.0.mlp.up.weight": ((w.ffn, w.decoder), Role("matrix", w.decoder, w.ffn)),
        "decoder.blocks.0.lift.weight": ((w.decoder, FIXED), Role("matrix", FIXED, w.decoder)),
        "decoder.head.weight": ((PADDED, w.decoder), Role("head", w.decoder, VOCAB, rows=VOCAB)),
    }
    model = nn.Module()
    for name, (shape, role) in table.items():
        _put(model, name, declare(nn.Parameter(torch.empty(shape, device=device)), role))
    return model


def closed_form(w: Widths, b: Widths) -> dict[str, tuple[float, float, float, float]]:
    """Name -> (init std, lr, decay, eps) by the table of mmtrain/mup/rules.py, for widths `w` against the base `b`."""
    v, c, d = w.vision / b.vision, w.connector / b.connector, w.decoder / b.decoder
    e, kv, ffn = w.expert_ffn / b.expert_ffn, w.kv / b.kv, w.ffn / b.ffn
    base = {"v": b.vision**-0.5, "e": b.expert_ffn**-0.5, "c": b.connector**-0.5, "d": b.decoder**-0.5}

    def matrix(std: float, m_in: float, m_out: float) -> tuple[float, float, float, float]:
        if m_in == 1:
            return std, 1.0, 1.0, 1 / m_out
        return std / m_in**0.5, 1 / m_in, m_in, 1 / m_out

    fixed_router = (base["v"] / v, 1 / v, v, 1.0)
    growing_router = (base["v"] / v**0.5, 1 / v, v, b.experts / w.experts)
    return {
        "vision.patch.weight": (48**-0.5, 1.0, 1.0, 1 / v),
        "vision.positions": (0.02, 1.0, 1.0, 1 / v),
        "vision.blocks.0.norm1.weight": (0.0, 1.0, 0.0, 1 / v),
        "vision.blocks.0.attention.q.weight": matrix(base["v"], v, v),
        "vision.blocks.0.mlp.router.weight": fixed_router if w.experts == b.experts else growing_router,
        "vision.blocks.0.mlp.experts.up": matrix(base["v"], v, e),
        "vision.blocks.0.mlp.experts.up_bias": (0.0, 1.0, 0.0, 1 / e),
        "vision.blocks.0.mlp.experts.down": matrix(base["e"], e, v),
        "connector.depthwise": (1 / 3, 1.0, 1.0, 1 / c),
        "connector.shift": (0.5, 1.0, 0.0, 1 / c),
        "connector.mlp.up.weight": matrix(base["v"], v, c),
        "connector.mlp.down.weight": matrix(base["c"], c, d),
        "decoder.embedding.weight": (0.02, 1.0, 1.0, 1 / d),
        "decoder.blocks.0.attention.k.weight": matrix(base["d"], d, kv),
        "decoder.blocks.0.mlp.up.weight": matrix(base["d"], d, ffn),
        "decoder.blocks.0.lift.weight": matrix(FIXED**-0.5, 1.0, d),
        "decoder.head.weight": (base["d"], 1.0, 1.0, 1 / d),
    }


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, last = name.split(".")
    for child in path:
        if not hasattr(model, child):
            model.add_module(child, nn.Module())
        model = getattr(model, child)
    model.register_parameter(last, parameter)
