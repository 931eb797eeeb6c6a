from dataclasses import replace

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Connector, Decoder, Model, Moe, Mup, Vision
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import base_model_config, forward_scales

MODEL = Model(
    vision=Vision(hidden_size=128, num_heads=4, intermediate_size=512, moe=Moe(num_experts=8)),
    connector=Connector(kind="attention_pool", hidden_size=96, num_heads=2),
    decoder=Decoder(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=32, intermediate_size=640),
)


def test_without_a_base_the_forward_is_plain():
    assert base_model_config(MODEL, {}) == MODEL
    assert forward_scales(MODEL, MODEL, Mup()) == Scales()


def test_only_the_named_widths_change():
    base = base_model_config(
        MODEL,
        {
            "vision": {"hidden_size": 64, "num_experts": 4, "intermediate_size": 256},
            "connector": {"hidden_size": 32},
            "decoder": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 160},
        },
    )
    vision = replace(MODEL.vision, hidden_size=64, intermediate_size=256, moe=Moe(num_experts=4))
    decoder = replace(MODEL.decoder, hidden_size=64, num_heads=4, num_kv_heads=1, head_dim=16, intermediate_size=160)
    assert base == Model(vision, replace(MODEL.connector, hidden_size=32), decoder)


def test_the_scales_follow_the_formulas():
    widths = {"vision": {"hidden_size": 32}, "connector": {"hidden_size": 24}, "decoder": {"hidden_size": 64}}
    base = base_model_config(MODEL, widths)
    scales = forward_scales(MODEL, base, Mup(embedding=3.0, attention=2.0, cross_attention=7.0, output=5.0))
    assert scales.attention_vision == pytest.approx(2.0 * 8**0.5 / 32)
    assert scales.attention_connector == pytest.approx(7.0 * 12**0.5 / 48)
    assert scales.attention_decoder == pytest.approx(2.0 / 32**0.5)  # the head size is at its base
    assert (scales.embedding, scales.output) == (3.0, 5.0 * 64 / 256)


def test_at_equal_head_size_attention_is_that_of_standard_parametrisation():
    base = base_model_config(MODEL, {"vision": {"hidden_size": 64, "num_heads": 2}, "decoder": {"head_dim": 8}})
    scales = forward_scales(MODEL, base, Mup())
    assert scales.attention_vision is None
    assert scales.attention_decoder == pytest.approx(8**0.5 / 32)


def test_a_connector_without_attention_has_no_scale():
    model = replace(MODEL, connector=Connector(kind="c_abstractor", hidden_size=96, num_heads=7))
    base = base_model_config(model, {"connector": {"hidden_size": 40}})
    assert forward_scales(model, base, Mup(attention=2.0)).attention_connector is None


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (
            {"vison": {"hidden_size": 8}},
            r"mup\.base\.vison: the parts are vision, connector, decoder \(did you mean vi",
        ),
        (
            {"vision": {"hiden_size": 8}},
            r"mup\.base\.vision\.hiden_size: no width of vision \(did you mean hidden_size\?\); its widths are hidden_",
        ),
        ({"decoder": {"num_layers": 8}}, r"mup\.base\.decoder\.num_layers: no width of decoder"),
        ({"vision": {"hidden_size": 0}}, r"mup\.base\.vision\.hidden_size: is 0; a base width is at least 1"),
        ({"decoder": {"num_experts": 4}}, r"num_experts: is 4, but model\.decoder has no experts; leave it out"),
        ({"vision": {"num_experts": 1}}, r"mup\.base\.vision\.num_experts: is 1, but each token visits top_k 2; take"),
        (
            {"vision": {"hidden_size": 66}},
            r"mup\.base\.vision: hidden_size 66 is no multiple of num_heads 4; name both",
        ),
        ({"connector": {"num_heads": 5}}, r"mup\.base\.connector: hidden_size 96 is no multiple of num_heads 5; name"),
        ({"decoder": {"num_heads": 3}}, r"mup\.base\.decoder: num_heads 3 is no multiple of num_kv_heads 2; name both"),
    ],
)
def test_an_impossible_base_is_refused(base, message):
    with pytest.raises(ConfigError, match=message):
        base_model_config(MODEL, base)


def test_a_base_whose_mlp_has_no_such_slices_is_refused():
    narrow = replace(MODEL, decoder=replace(MODEL.decoder, moe=Moe(num_experts=4, granularity=4)))
    width = MODEL.decoder.intermediate_size // 2 + 2
    message = rf"mup.base: decoder.intermediate_size is {width} there, no multiple of model.decoder.moe.granularity 4; "
    with pytest.raises(ConfigError, match=message):
        base_model_config(narrow, {"decoder": {"intermediate_size": width}})


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        base_model_config(MODEL, {"vison": {}, "vision": {"depth": 2, "hidden_size": -1}})
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()] == [
        "the base of muP cannot be built",
        "mup.base.vison",
        "mup.base.vision.depth",
        "mup.base.vision.hidden_size",
    ]
