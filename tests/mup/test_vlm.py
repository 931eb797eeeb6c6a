"""The table on the real model: complete for every variant, plain at the base, and true to the tensors' own shapes."""

import math
from itertools import product

import pytest
import torch

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Model, Mup
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.init import initialize
from mmtrain.mup.registry import Registry, is_expert
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import base_model_config, forward_scales
from tests.mup.small import BASE, KINDS, config, meta


def registry(model: Model, base: dict[str, dict[str, int]] = BASE, mup: Mup = Mup()) -> Registry:  # noqa: B008
    return Registry.build(meta(model), meta(base_model_config(model, base)), mup)


VARIANTS = [config(*variant) for variant in product(KINDS, (0, 4), (False, True), (False, True))]


@pytest.mark.parametrize("model", VARIANTS, ids=[f"{m.connector.kind}{i}" for i, m in enumerate(VARIANTS)])
def test_every_parameter_of_every_variant_has_a_row_and_fans_that_fit_its_shape(model):
    table = registry(model)
    parameters = dict(meta(model).named_parameters())
    assert list(table.entries) == list(parameters)
    for name, entry in table.entries.items():
        shape = entry.shape[1:] if is_expert(name) else entry.shape
        assert tuple(parameters[name].shape) == entry.shape
        role = entry.role
        if role.kind == "vector":
            assert shape == (role.fan_out,), name
        elif role.kind in ("matrix", "router"):
            assert shape[0] == role.fan_out and math.prod(shape[1:]) == role.fan_in, name
        elif role.kind == "head":
            assert shape == (256, role.fan_in) and role.fan_out == role.rows == 200, name
        elif name == "vision.patch.weight" or "depthwise" in name:
            assert shape[0] == role.fan_out and math.prod(shape[1:]) == role.fan_in, name
        else:
            assert shape[-1] == role.fan_out, name


@pytest.mark.parametrize("model", VARIANTS[:: len(VARIANTS) // 8 - 1])
def test_at_the_base_the_model_is_plain(model):
    assert forward_scales(model, base_model_config(model, {}), Mup()) == Scales()
    for name, entry in registry(model, base={}).entries.items():
        assert (entry.m_in, entry.m_out, entry.lr_mult, entry.eps_mult) == (1.0, 1.0, 1.0, 1.0), name
        assert entry.wd_mult == float(entry.role.kind != "vector"), name
        if entry.role.init == "normal":
            assert entry.init_std == (entry.role.std or entry.role.fan_in**-0.5), name


def test_no_gain_and_no_bias_decays():
    for model in VARIANTS:
        for name, entry in registry(model).entries.items():
            if len(entry.shape) == 1 or "norm" in name or "bias" in name:
                assert entry.wd_mult == 0.0, name
            else:
                assert entry.wd_mult > 0.0, name


def test_the_weights_of_the_model_have_the_kinds_of_the_design():
    table = registry(config(experts=4, rich=True))
    kinds = {
        "vision.patch.weight": ("input", 1.0, 2.0),
        "vision.positions": ("input", 1.0, 2.0),
        "vision.blocks.0.attention.q.weight": ("matrix", 2.0, 2.0),
        "vision.blocks.0.mlp.router.weight": ("router", 2.0, 1.0),
        "vision.blocks.0.mlp.experts.up": ("matrix", 2.0, 4.0),
        "vision.blocks.0.mlp.experts.down": ("matrix", 4.0, 2.0),
        "vision.blocks.0.mlp.experts.up_bias": ("vector", 1.0, 4.0),
        "connector.stage1.0.depthwise.weight": ("input", 1.0, 2.0),
        "connector.stage1.0.enter.weight": ("matrix", 2.0, 2.0),
        "connector.mlp.experts.up": ("matrix", 2.0, 4.0),
        "decoder.embedding.weight": ("input", 1.0, 4.0),
        "decoder.blocks.0.attention.k.weight": ("matrix", 4.0, 1.0),  # kv heads and their size stay: a fixed width
        "decoder.blocks.0.attention.q.weight": ("matrix", 4.0, 2.0),
        "decoder.blocks.0.attention.q_norm.weight": ("vector", 1.0, 1.0),
        "decoder.blocks.0.mlp.gate.weight": ("matrix", 4.0, 3.0),
        "decoder.blocks.1.mlp.experts.down": ("matrix", 3.0, 4.0),
        "decoder.norm.weight": ("vector", 1.0, 4.0),
        "decoder.head.weight": ("head", 4.0, 1.0),
    }
    for name, expected in kinds.items():
        entry = table[name]
        assert (entry.role.kind, entry.m_in, entry.m_out) == expected, name


def test_cross_attention_has_the_fans_of_its_queries_and_of_the_patches_that_they_read():
    """Queries grow with the connector, keys and values read as wide as vision is: other rates, although siblings."""
    model = config("attention_pool")
    vision, width = model.vision.hidden_size, model.connector.hidden_size
    base = {
        "vision": {"hidden_size": vision // 2, "num_heads": 1},
        "connector": {"hidden_size": width // 8, "num_heads": 1},
    }
    table, plain = registry(model, base), registry(model, {})
    for name, (m_in, m_out) in {"q": (8, 8), "k": (2, 8), "v": (2, 8), "out": (8, 8)}.items():
        entry, start = (found[f"connector.attention.{name}.weight"] for found in (table, plain))
        assert (entry.m_in, entry.m_out) == (m_in, m_out), name
        fan_in = {"q": width, "k": vision, "v": vision, "out": width}[name]
        assert start.init_std == pytest.approx(fan_in**-0.5)
        assert entry.init_std == pytest.approx((fan_in / m_in) ** -0.5 * m_in**-0.5)
        assert (entry.lr_mult, entry.wd_mult, entry.eps_mult) == (1 / m_in, m_in, 1 / m_out), name
    assert table["connector.queries"].lr_mult == 1.0 and table["connector.queries"].eps_mult == 1 / 8


def test_a_tied_head_is_an_embedding_with_the_heads_forward_factor():
    model = config(tied=True)
    table = registry(model)
    assert "decoder.head.weight" not in table.entries
    assert table["decoder.embedding.weight"].lr_mult == 1.0
    scales = forward_scales(model, base_model_config(model, BASE), Mup())
    assert scales.output == 32 / 128


def test_a_base_in_other_proportions_is_refused():
    equal = {**BASE, "connector": {"hidden_size": 16, "num_heads": 2}}  # as wide as vision, unlike in the model
    with pytest.raises(ConfigError, match=r"only the model has \['connector\.stage1\.0\.shortcut\.weight'"):
        registry(config(), base=equal)


def test_initialize_fills_the_model_and_leaves_padding_at_zero():
    for tied in (False, True):
        chosen = config(experts=4, tied=tied, rich=True)
        model, table = VisionLanguageModel(chosen), registry(chosen)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        initialize(model, table, seed=0)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        for weight in {model.decoder.embedding.weight, model.decoder.head.weight}:
            assert weight[200:].eq(0).all() and weight[:200].ne(0).any(1).all()
