from dataclasses import replace

import pytest
import torch
from torch import nn

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Mup
from mmtrain.mup.registry import Registry, is_expert
from mmtrain.mup.roles import Role, declare
from tests.mup.toy import Widths, toy

BASE = Widths()
GROWN = replace(BASE, vision=64, decoder=128)


def build(widths: Widths = GROWN, base: Widths = BASE, **mup) -> Registry:
    return Registry.build(toy(widths), toy(base), Mup(**mup))


def test_a_parameter_without_a_role_is_named():
    model = toy(GROWN)
    model.vision.extra = nn.Parameter(torch.empty(3, device="meta"))
    message = r"1 of 18 parameters have no role, so muP has no rule for them: vision\.extra; declare each one beside"
    with pytest.raises(ValueError, match=message):
        Registry.build(model, toy(BASE), Mup())
    with pytest.raises(ValueError, match=r"vision\.extra"):
        Registry.build(toy(GROWN), model, Mup())


def test_a_base_with_other_parameters_is_refused():
    deeper = toy(BASE)
    deeper.vision.extra = declare(nn.Parameter(torch.empty(3)), Role("vector", None, 3, init="zeros"))
    message = (
        r"mup\.base: .* only the model has \[\], only the base has \['vision\.extra'\]; take base widths in the mod"
    )
    with pytest.raises(ConfigError, match=message):
        Registry.build(toy(GROWN), deeper, Mup())


def test_a_base_with_other_roles_is_refused():
    other = toy(BASE)
    declare(other.vision.positions, Role("matrix", 9, BASE.vision))
    with pytest.raises(ValueError, match=r"parameter vision\.positions is Role.*only fans may differ"):
        Registry.build(toy(GROWN), other, Mup())


def test_a_parameter_of_no_part_is_refused():
    model = nn.Module()
    model.adapter = declare(nn.Parameter(torch.empty(3)), Role("vector", None, 3, init="zeros"))
    with pytest.raises(ValueError, match=r"parameter adapter belongs to no part: names begin with vision, connector"):
        Registry.build(model, model, Mup())


def test_an_unknown_part_of_mup_lr_is_refused():
    message = r"mup\.lr\.decodr: the parts are vision, connector, decoder \(did you mean decoder\?\)"
    with pytest.raises(ConfigError, match=message):
        build(lr={"decodr": 2.0})


def test_a_tied_weight_is_there_once():
    model = toy(GROWN)
    del model.decoder.head.weight
    model.decoder.head.weight = model.decoder.embedding.weight
    base = toy(BASE)
    del base.decoder.head.weight
    base.decoder.head.weight = base.decoder.embedding.weight
    registry = Registry.build(model, base, Mup())
    assert "decoder.embedding.weight" in registry.entries
    assert "decoder.head.weight" not in registry.entries
    assert registry["decoder.embedding.weight"].role.kind == "input"


def test_the_hash_sees_widths_bases_and_roles_and_nothing_else():
    reference = build().hash()
    assert reference == build(init=2.0, router=3.0, lr={"vision": 0.1}).hash()
    turned = Registry(dict(reversed(build().entries.items())))
    assert reference == turned.hash()
    others = [build(replace(GROWN, ffn=80)), build(base=replace(BASE, decoder=64)), build(base=GROWN)]
    model, base = toy(GROWN), toy(BASE)
    for one in (model, base):
        declare(one.vision.positions, replace(one.vision.positions.role, kind="matrix"))
    others.append(Registry.build(model, base, Mup()))
    assert len({reference, *(other.hash() for other in others)}) == 5


def test_experts_are_known_by_name():
    assert is_expert("decoder.blocks.3.mlp.experts.gate")
    assert not is_expert("decoder.blocks.3.mlp.router.weight")
