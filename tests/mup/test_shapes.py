"""PyPI `mup` as the oracle, for the shapes that it supports."""

import pytest
import torch
from mup import MuAdamW, MuReadout, set_base_shapes
from mup import init as mup_init
from torch import nn

from mmtrain.config.schema import Mup, Optim, Recipe
from mmtrain.mup.init import initialize
from mmtrain.mup.registry import Registry
from mmtrain.mup.roles import Role, declare
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.mup.shapes import read_base_shapes, write_base_shapes
from mmtrain.optim.groups import param_groups
from tests.mup.small import BASE, KINDS, config, meta
from tests.mup.toy import Widths, toy

LR, DECAY = 0.01, 0.1


class Tower(nn.Module):
    """Embedding, two hidden maps around a norm, readout: all that the library knows."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.up = nn.Linear(width, ffn)
        self.norm = nn.LayerNorm(ffn)
        self.down = nn.Linear(ffn, width)
        self.head = MuReadout(width, 11, bias=False)
        declare(self.embedding.weight, Role("input", 11, width, std=0.02))
        declare(self.up.weight, Role("matrix", width, ffn))
        declare(self.down.weight, Role("matrix", ffn, width))
        declare(self.head.weight, Role("head", width, 11, std=0.02))
        for bias, size in ((self.up.bias, ffn), (self.norm.bias, ffn), (self.down.bias, width)):
            declare(bias, Role("vector", None, size, init="zeros"))
        declare(self.norm.weight, Role("vector", None, ffn, init="ones"))


def model(width: int, ffn: int) -> nn.Module:
    whole = nn.Module()
    whole.decoder = Tower(width, ffn)
    return whole


WIDTHS = [(64, 96), (32, 256), (16, 16), (128, 24)]


def recipe() -> Recipe:
    return Recipe(name="test", out="nowhere", optim=Optim(lr=LR, weight_decay=DECAY))


def muadamw(target: nn.Module) -> dict[str, dict]:
    """Parameter name -> the library's group."""
    names = {id(parameter): name for name, parameter in target.named_parameters()}
    groups = MuAdamW(target.parameters(), lr=LR, weight_decay=DECAY).param_groups
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(("width", "ffn"), WIDTHS)
def test_rates_and_decay_are_those_of_muadamw(width, ffn):
    target, base = model(width, ffn), model(16, 24)
    registry = Registry.build(target, base, Mup())
    ours = {name: g for g in param_groups(dict(target.named_parameters()), registry, recipe()) for name in g["names"]}
    set_base_shapes(target, base, do_assert=False)
    for name, group in muadamw(target).items():
        if registry[name].m_in != 1 and registry[name].m_out == 1 and registry[name].role.kind == "matrix":
            continue  # into a fixed width: the library wants a MuReadout there
        assert ours[name]["lr"] == pytest.approx(group["lr"], rel=1e-12), name
        if registry[name].role.kind != "vector":  # the library decays gains and biases too
            assert ours[name]["weight_decay"] == pytest.approx(group["weight_decay"], rel=1e-12), name


@pytest.mark.parametrize(("width", "ffn"), WIDTHS)
def test_initial_stds_are_those_of_mup_init(width, ffn):
    target, base = model(width, ffn), model(16, 24)
    registry = Registry.build(target, base, Mup())
    set_base_shapes(target, base, do_assert=False)
    stds = {"embedding": 0.02, "head": 0.02, "up": 16**-0.5, "down": 24**-0.5}
    for name in ("decoder.embedding.weight", "decoder.up.weight", "decoder.down.weight", "decoder.head.weight"):
        parameter = target.get_parameter(name)
        torch.manual_seed(0)
        unit = torch.randn(parameter.shape)
        torch.manual_seed(0)
        mup_init.normal_(parameter, std=stds[name.split(".")[1]])
        if registry[name].role.kind == "matrix" and registry[name].m_out == 1 != registry[name].m_in:
            continue
        assert torch.allclose(parameter, unit * registry[name].init_std, rtol=1e-5), name


@pytest.mark.parametrize("width", [16, 64, 128])
def test_the_output_factor_is_that_of_mureadout(width):
    target, base = model(width, 48), model(16, 24)
    set_base_shapes(target, base, do_assert=False)
    chosen = config()
    wide = base_model_config(chosen, {"decoder": {"hidden_size": width}})
    narrow = base_model_config(chosen, {"decoder": {"hidden_size": 16}})
    scale = forward_scales(wide, narrow, Mup()).output
    hidden = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    plain = hidden @ target.decoder.head.weight.T
    assert torch.allclose(target.decoder.head(hidden), scale * plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [0, 4])
def test_the_whole_models_rates_are_those_of_muadamw_from_the_written_file(kind, experts, tmp_path):
    chosen = config(kind, experts, rich=True)
    target, base = meta(chosen), meta(base_model_config(chosen, BASE))
    registry = Registry.build(target, base, Mup())
    ours = {name: g for g in param_groups(dict(target.named_parameters()), registry, recipe()) for name in g["names"]}
    write_base_shapes(target, base, tmp_path / "base.bsh")
    set_base_shapes(target, str(tmp_path / "base.bsh"), rescale_params=False, do_assert=False)
    compared = 0
    for name, group in muadamw(target).items():
        entry = registry[name]
        supported = entry.role.kind != "router" and not (entry.role.kind == "matrix" and entry.m_out == 1 != entry.m_in)
        if supported:
            assert ours[name]["lr"] == pytest.approx(group["lr"], rel=1e-12), name
            compared += 1
    assert compared > 0.8 * len(registry.entries)


def test_a_base_shape_file_says_base_sizes_and_null(tmp_path):
    base, grown = Widths(), Widths(vision=64, expert_ffn=48, connector=8, decoder=160, kv=8, ffn=120)
    path = tmp_path / "base.bsh"
    write_base_shapes(toy(grown), toy(base), path)
    read = read_base_shapes(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in toy(grown).named_parameters()}
    assert read.keys() == shapes.keys()
    for name, parameter in toy(base).named_parameters():
        sizes = zip(tuple(parameter.shape), shapes[name], strict=True)
        assert read[name] == tuple(None if size == grown_size else size for size, grown_size in sizes), name
    assert read["vision.blocks.0.mlp.experts.up"] == (None, 24, 16)
    assert path.read_text().startswith("# This is a base shape file encoded in yaml")


def test_the_initial_values_serve_a_model_that_the_library_labelled():
    target, base = model(64, 96), model(16, 24)
    registry = Registry.build(target, base, Mup())
    set_base_shapes(target, base, rescale_params=False)
    initialize(target, registry, seed=0)
    expected = 16**-0.5 * (64 / 16) ** -0.5
    assert target.decoder.up.weight.std().item() == pytest.approx(expected, rel=0.05)
