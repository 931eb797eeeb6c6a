"""The dense feed-forward layer is its textbook formula, and makes no values of its own."""

import math

import pytest
import torch

from mmtrain.model.mlp import Activation, Mlp, linear


def filled(activation: Activation, bias: bool) -> Mlp:
    torch.manual_seed(0)
    mlp = Mlp(5, 7, 3, activation, bias)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    return mlp


FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", FORMULAS)
def test_mlp_is_two_linear_maps_around_the_activation(activation: Activation, bias: bool) -> None:
    mlp = filled(activation, bias)
    x = torch.randn(2, 4, 5)
    up = x @ mlp.up.weight.t() + (mlp.up.bias if bias else 0)
    expected = FORMULAS[activation](up) @ mlp.down.weight.t() + (mlp.down.bias if bias else 0)
    torch.testing.assert_close(mlp(x), expected)


def test_swiglu_gates_up_by_silu() -> None:
    mlp = filled("swiglu", bias=False)
    x = torch.randn(4, 5)
    expected = (FORMULAS["silu"](x @ mlp.gate.weight.t()) * (x @ mlp.up.weight.t())) @ mlp.down.weight.t()
    torch.testing.assert_close(mlp(x), expected)
    assert [name for name, _ in mlp.named_parameters()] == ["up.weight", "gate.weight", "down.weight"]


def test_unknown_activation_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'relu' is none of gelu, gelu_tanh, quick_gelu, silu, swiglu"):
        Mlp(2, 2, 2, "relu", bias=False)


def test_linear_declares_roles_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    layer = linear(6, 4, bias=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight.role.kind == "matrix"
    assert (layer.weight.role.fan_in, layer.weight.role.fan_out) == (6, 4)
    assert (layer.bias.role.kind, layer.bias.role.init) == ("vector", "zeros")
    with torch.device("meta"):
        assert linear(6, 4, bias=True).weight.is_meta
