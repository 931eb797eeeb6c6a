"""The experts' hand-written products: derivatives, hooks of tensor parallelism, memory that moves, both paths."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmtrain.model.experts import Experts, Weights, grouped_experts
from mmtrain.model.mlp import Activation, activate

KINDS: list[tuple[Activation, bool]] = [
    ("gelu", True),
    ("gelu", False),
    ("gelu_tanh", True),
    ("quick_gelu", True),
    ("silu", True),
    ("silu", False),
    ("swiglu", False),
]
COUNTS = torch.tensor([3, 0, 5, 1, 7])


def filled(activation: Activation, bias: bool, sizes: tuple[int, int, int] = (8, 12, 4), experts: int = 5) -> Experts:
    torch.manual_seed(0)
    module = Experts(experts, *sizes, activation, bias)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def by_row(experts: Experts, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The slow twin: one row after the other."""
    out = []
    for row, e in zip(rows, torch.arange(len(counts)).repeat_interleave(counts).tolist(), strict=True):
        up = experts.up[e] @ row + (0 if experts.up_bias is None else experts.up_bias[e])
        gate = None if experts.gate is None else experts.gate[e] @ row
        hidden = activate(experts.activation, up) if gate is None else activate(experts.activation, gate) * up
        out.append(experts.down[e] @ hidden + (0 if experts.down_bias is None else experts.down_bias[e]))
    return torch.stack(out)


def gradients(experts: Experts, out: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a fixed random functional of `out`."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return list(torch.autograd.grad(out, [*inputs, *experts.parameters()], weight))


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_experts_equal_one_row_after_the_other(activation: Activation, bias: bool) -> None:
    experts, rows = filled(activation, bias), torch.randn(16, 8, requires_grad=True)
    fast, slow = experts(rows, COUNTS), by_row(experts, rows, COUNTS)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(experts, fast, rows), gradients(experts, slow, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_derivatives_by_finite_differences(activation: Activation, bias: bool) -> None:
    experts = filled(activation, bias, (3, 4, 2)).double()
    rows = torch.randn(16, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: experts(x, COUNTS), (rows, *experts.parameters()))


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_grouped_path_of_accelerators_equals_the_cpu_path(activation: Activation, bias: bool) -> None:
    """torch's grouped_mm runs on a CPU too, so its arithmetic is tested here; its kernels are not."""
    experts, rows = filled(activation, bias), torch.randn(16, 8, requires_grad=True)
    tensors = Weights(experts.up, experts.up_bias, experts.gate, experts.down, experts.down_bias)
    fast, grouped = experts(rows, COUNTS), grouped_experts(activation, rows, COUNTS, tensors)
    torch.testing.assert_close(grouped, fast, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(experts, grouped, rows), gradients(experts, fast, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False)])
def test_unused_expert_has_a_zero_gradient(activation: Activation, bias: bool) -> None:
    experts = filled(activation, bias)
    experts(torch.randn(16, 8), COUNTS).sum().backward()
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter.grad[1], torch.zeros_like(parameter[1])), name
        assert parameter.grad[2].abs().sum() > 0, name


def test_a_process_without_any_row_still_has_zero_gradients() -> None:
    experts = filled("swiglu", bias=False)
    rows = torch.empty(0, 8, requires_grad=True)
    experts(rows, torch.zeros(5, dtype=torch.long)).sum().backward()
    assert rows.grad.shape == (0, 8)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in experts.parameters())


def test_frozen_weights_get_no_gradient_and_pass_it_on() -> None:
    experts, rows = filled("gelu", bias=True), torch.randn(16, 8, requires_grad=True)
    whole = gradients(experts, experts(rows, COUNTS), rows)[0]
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    experts.up_bias.requires_grad_(True)
    assert torch.equal(gradients_of_rows(experts, rows), whole)
    assert experts.up.grad is None
    assert experts.up_bias.grad is not None


def gradients_of_rows(experts: Experts, rows: torch.Tensor) -> torch.Tensor:
    """The rows' gradient of the functional of `gradients`, through .backward()."""
    out = experts(rows, COUNTS)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    return rows.grad


@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False)])
def test_experts_cut_along_the_hidden_width_reduce_to_the_whole(activation: Activation, bias: bool) -> None:
    """Two tensor ranks by hand: each reduces to the sum, so that the bias is added once."""
    whole, rows = filled(activation, bias), torch.randn(16, 8)
    halves = [filled(activation, bias) for _ in range(2)]
    for i, half in enumerate(halves):
        cut = slice(6 * i, 6 * i + 6)
        half.up, half.down = (torch.nn.Parameter(w) for w in (whole.up[:, cut], whole.down[:, :, cut]))
        if bias:
            half.up_bias = torch.nn.Parameter(whole.up_bias[:, cut])
        else:
            half.gate = torch.nn.Parameter(whole.gate[:, cut])
    entered: list[torch.Tensor] = []
    partial: list[torch.Tensor] = []
    for half in halves:
        half.enter = lambda x: entered.append(x) or x
        half.reduce = lambda x: partial.append(x) or x
        half(rows, COUNTS)
    halves[0].reduce = lambda x: x + partial[1]
    torch.testing.assert_close(halves[0](rows, COUNTS), whole(rows, COUNTS), rtol=1e-5, atol=1e-5)
    assert [torch.equal(x, rows) for x in entered] == [True] * 3  # twice for the partial products, once for the sum


def test_hooked_experts_have_the_gradients_of_plain_ones() -> None:
    plain, hooked = filled("gelu", bias=True), filled("gelu", bias=True)
    hooked.reduce = lambda x: x * 1
    rows = torch.randn(16, 8, requires_grad=True)
    both = (gradients(experts, experts(rows, COUNTS), rows) for experts in (plain, hooked))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouped", [False, True], ids=["cpu", "grouped"])
def test_backward_reads_parameters_whose_memory_was_swapped(grouped: bool) -> None:
    """ZeRO-3 empties parameter.data after the forward and fills it before the backward, elsewhere in memory."""
    experts, rows = filled("swiglu", bias=False), torch.randn(16, 8, requires_grad=True)
    tensors = Weights(experts.up, None, experts.gate, experts.down, None)

    def run() -> torch.Tensor:
        return grouped_experts("swiglu", rows, COUNTS, tensors) if grouped else experts(rows, COUNTS)

    expected = gradients(experts, run(), rows)
    out = run()
    values = {name: parameter.data.clone() for name, parameter in experts.named_parameters()}
    for parameter in experts.parameters():
        parameter.data.fill_(float("nan"))
        parameter.data = torch.empty(0)
    for name, parameter in experts.named_parameters():
        parameter.data = values[name]
    for a, b in zip(gradients(experts, out, rows), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool) -> None:
    experts, rows = filled("gelu", bias=True), torch.randn(16, 8, requires_grad=True)
    experts(rows, COUNTS).square().sum().backward()
    expected = [tensor.grad.clone() for tensor in (rows, *experts.parameters())]
    experts.zero_grad()
    rows.grad = None
    checkpoint(experts, rows, COUNTS, use_reentrant=reentrant).square().sum().backward()
    for tensor, gradient in zip((rows, *experts.parameters()), expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_bf16_weights_are_used_as_they_are(activation: Activation, bias: bool) -> None:
    experts = filled(activation, bias).bfloat16()
    rows = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
    fast, slow = experts(rows, COUNTS), by_row(experts, rows, COUNTS)
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, rtol=0.03, atol=0.1)  # a few bf16 roundings of 2^-8 on values up to 10
    for a, b in zip(gradients(experts, fast, rows), gradients(experts, slow, rows), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).float().norm() <= 0.02 * b.float().norm()


def test_swiglu_experts_with_biases_are_refused() -> None:
    with pytest.raises(ValueError, match="swiglu experts have no biases"):
        Experts(2, 4, 4, 4, "swiglu", bias=True)


def test_roles_hold_the_fans_of_one_expert() -> None:
    roles = {name: parameter.role for name, parameter in filled("gelu", bias=True).named_parameters()}
    assert (roles["up"].kind, roles["up"].fan_in, roles["up"].fan_out) == ("matrix", 8, 12)
    assert (roles["down"].kind, roles["down"].fan_in, roles["down"].fan_out) == ("matrix", 12, 4)
    assert {roles[name].kind for name in ("up_bias", "down_bias")} == {"vector"}
