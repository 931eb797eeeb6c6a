"""The sparse layer equals a slow loop over tokens, and the dense layer where it must."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config.schema import Moe
from mmtrain.model.mlp import Activation, Mlp, activate
from mmtrain.model.moe import Routed, RouterInput, SparseMlp, combine_rows, gather_rows, sort_by_expert

RELATIVE = 1e-5  # fp32: sums of up to a few hundred products in another order
SIZES = (8, 12, 6)  # d_in, hidden, d_out


def router_input(num_experts: int, valid: torch.Tensor) -> RouterInput:
    """Even shares of the previous step, this batch as the whole global batch, no bias."""
    share = torch.full((num_experts,), 1 / num_experts)
    return RouterInput(share, valid.sum().float(), torch.zeros(num_experts))


def sparse(moe: Moe, activation: Activation = "gelu", bias: bool = True, router_std: float = 1.0) -> SparseMlp:
    torch.manual_seed(0)
    layer = SparseMlp(moe, *SIZES, activation, bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(layer.router.weight, std=router_std)
    return layer


def run(layer: SparseMlp, x: torch.Tensor) -> Routed:
    valid = torch.ones(x.shape[:-1], dtype=torch.bool)
    return layer(x, valid, router_input(layer.moe.num_experts, valid))


def by_token(layer: SparseMlp, x: torch.Tensor) -> torch.Tensor:
    """The slow twin: for each token, for each of its experts, one vector through the textbook formulas."""
    experts, k = layer.experts, layer.moe.top_k
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        probabilities = torch.softmax(layer.router.weight @ token, -1)
        best, ids = probabilities.topk(k)
        y = torch.zeros(experts.down.shape[1])
        for gate, e in zip(best / best.sum(), ids.tolist(), strict=True):
            up = experts.up[e] @ token + (0 if experts.up_bias is None else experts.up_bias[e])
            if experts.gate is None:
                hidden = activate(experts.activation, up)
            else:
                hidden = torch.nn.functional.silu(experts.gate[e] @ token) * up
            y = y + gate * (experts.down[e] @ hidden + (0 if experts.down_bias is None else experts.down_bias[e]))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def assert_equal_layers(layer: SparseMlp, x: torch.Tensor) -> None:
    """Values and all gradients of the layer against its slow twin."""
    x = x.requires_grad_(True)
    fast, slow = run(layer, x).out, by_token(layer, x)
    weight = torch.randn_like(slow)
    inputs = [x, *layer.parameters()]
    pairs = [(fast, slow)]
    pairs += zip(torch.autograd.grad(fast, inputs, weight), torch.autograd.grad(slow, inputs, weight), strict=True)
    for a, b in pairs:
        assert (a - b).norm() <= RELATIVE * max(b.norm(), 1.0)


@pytest.mark.parametrize(
    ("activation", "bias"),
    [("gelu", True), ("gelu_tanh", True), ("quick_gelu", True), ("silu", True), ("silu", False), ("swiglu", False)],
)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_sparse_layer_equals_a_loop_over_tokens(activation: Activation, bias: bool, top_k: int) -> None:
    layer = sparse(Moe(num_experts=5, top_k=top_k), activation, bias)
    assert_equal_layers(layer, torch.randn(3, 7, 8))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**16))
def test_any_number_of_tokens_experts_and_choices(num_experts: int, top_k: int, tokens: int, seed: int) -> None:
    layer = sparse(Moe(num_experts=num_experts, top_k=min(top_k, num_experts)))
    assert_equal_layers(layer, torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)))


def test_ragged_loads_leave_unused_experts_with_zero_gradients() -> None:
    layer = sparse(Moe(num_experts=16, top_k=2), router_std=1.0)
    x = torch.randn(1, 8).expand(11, 8) + 0.01 * torch.randn(11, 8)  # alike, so that they choose alike
    routed = run(layer, x)
    assert (routed.counts == 0).any()
    routed.out.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("experts"):
            assert torch.equal(parameter.grad[routed.counts == 0], torch.zeros_like(parameter[routed.counts == 0]))
    assert_equal_layers(layer, x.detach().clone())


@pytest.mark.parametrize(
    ("activation", "bias"), [("gelu", True), ("quick_gelu", True), ("silu", True), ("swiglu", False)]
)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_identical_experts_are_the_dense_layer(activation: Activation, bias: bool, top_k: int) -> None:
    layer = sparse(Moe(num_experts=4, top_k=top_k), activation, bias)
    dense = Mlp(*SIZES, activation, bias)
    for name, parameter in dense.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        matrix, kind = name.split(".")
        fused = getattr(layer.experts, matrix if kind == "weight" else f"{matrix}_bias")
        with torch.no_grad():
            fused.copy_(parameter)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(run(layer, x).out, dense(x), rtol=RELATIVE, atol=RELATIVE)


def test_bias_balancing_selects_by_probability_plus_bias_and_weighs_by_probability() -> None:
    layer = sparse(Moe(num_experts=4, top_k=2, balance="bias"))
    x, valid = torch.randn(9, 8), torch.ones(9, dtype=torch.bool)
    pushed = router_input(4, valid)._replace(bias=torch.tensor([0.0, 0.0, 0.0, 2.0]))
    routed = layer(x, valid, pushed)
    assert routed.counts[3] == 9
    probabilities = torch.softmax(x @ layer.router.weight.t(), -1)
    expected = []
    for n in range(9):
        other = int(probabilities[n, :3].argmax())
        pair = torch.stack((probabilities[n, other], probabilities[n, 3]))
        gates = pair / pair.sum()
        experts = layer.experts
        ys = [
            experts.down[e] @ activate("gelu", experts.up[e] @ x[n] + experts.up_bias[e]) + experts.down_bias[e]
            for e in (other, 3)
        ]
        expected.append(gates[0] * ys[0] + gates[1] * ys[1])
    torch.testing.assert_close(routed.out, torch.stack(expected), rtol=RELATIVE, atol=RELATIVE)
    assert routed.balance == 0


def test_bias_is_not_read_unless_balance_is_bias() -> None:
    layer = sparse(Moe(num_experts=4, top_k=2))
    x, valid = torch.randn(9, 8), torch.ones(9, dtype=torch.bool)
    plain = router_input(4, valid)
    pushed = plain._replace(bias=torch.tensor([0.0, 0.0, 0.0, 2.0]))
    assert torch.equal(layer(x, valid, pushed).out, layer(x, valid, plain).out)


def test_bf16_layer_routes_in_float32() -> None:
    layer = sparse(Moe(num_experts=4, top_k=2)).bfloat16()
    x = torch.randn(3, 7, 8, dtype=torch.bfloat16, requires_grad=True)
    routed = run(layer, x)
    assert routed.out.dtype == torch.bfloat16
    assert {routed.balance.dtype, routed.z.dtype, routed.counts.dtype} == {torch.float32}
    (routed.out.float().sum() + routed.balance + routed.z).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in layer.parameters())
    slow = by_token(layer.float(), x.float())
    torch.testing.assert_close(routed.out.float(), slow, rtol=0.03, atol=0.05)


def test_invalid_tokens_get_outputs_too() -> None:
    layer = sparse(Moe(num_experts=4, top_k=2))
    x, valid = torch.randn(3, 7, 8), torch.rand(3, 7) < 0.5
    torch.testing.assert_close(layer(x, valid, router_input(4, valid)).out, run(layer, x).out)


def test_layer_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = SparseMlp(Moe(num_experts=4), *SIZES, "swiglu", bias=False)
    names = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert names == {
        "router.weight": (4, 8),
        "experts.up": (4, 12, 8),
        "experts.gate": (4, 12, 8),
        "experts.down": (4, 6, 12),
    }
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.router.weight.role.kind == "router"


def test_order_sorts_by_expert_and_keeps_tokens_in_order() -> None:
    order = sort_by_expert(torch.tensor([[2, 0], [0, 2], [2, 4]]), 5)
    assert order.source.tolist() == [1, 2, 0, 3, 4, 5]
    assert order.position.flatten()[order.source].tolist() == list(range(6))
    assert order.counts.tolist() == [2, 0, 3, 0, 1]


def test_derivatives_of_gather_and_combine() -> None:
    order = sort_by_expert(torch.tensor([[2, 0], [0, 2], [2, 4]]), 5)
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    rows = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    gates = torch.rand(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gather_rows(a, order), x)
    assert torch.autograd.gradcheck(lambda a, b: combine_rows(a, b, order), (rows, gates))
