"""All experts of a sparse layer as three-dimensional weights, and their matrix products over sorted rows.

On a CPU one autograd function runs expert by expert, forward and backward, into slices of preallocated tensors: an
expert's hidden rows are used while they are in the cache and then overwritten by the next expert's, because fresh
memory costs page faults (2 us each, measured) and a concatenation costs a copy. On an
accelerator the products are torch's grouped_mm, which never asks the host how many rows an expert has.

Weights are saved for backward as the parameters themselves, never as views: ZeRO-3 empties `parameter.data` after the
forward and fills it again before the backward; a saved parameter follows, a view would keep the gathered memory alive.

Letters: R rows sorted by expert, E experts, f hidden width, d_in and d_out outer widths.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from mmtrain.model.mlp import QUICK_GELU_SLOPE, Activation, activate
from mmtrain.mup.roles import Role, declare

Maybe = torch.Tensor | None


class Weights(NamedTuple):
    """The tensors of E experts; gate is None but for swiglu, biases are None where there are none."""

    up: torch.Tensor
    """[E, f, d_in]."""
    up_bias: Maybe
    """[E, f]."""
    gate: Maybe
    """[E, f, d_in]."""
    down: torch.Tensor
    """[E, d_out, f]."""
    down_bias: Maybe
    """[E, d_out]."""


def identity(x: torch.Tensor) -> torch.Tensor:
    """The hook of experts that are not cut across ranks."""
    return x


def _by_rows(x: Maybe, sizes: list[int]) -> tuple[Maybe, ...]:
    """Views [rows of the expert, width] of x [R, width], one an expert."""
    return (None,) * len(sizes) if x is None else x.split(sizes)


def _by_expert(weights: Weights, num_experts: int) -> list[Weights]:
    """Views of each expert's own tensors."""
    absent = (None,) * num_experts
    return [Weights(*own) for own in zip(*(absent if w is None else w.unbind(0) for w in weights), strict=True)]


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a b, as out^T = b^T a^T: this way round MKL is 3 % faster on some hundred rows, and no slower on more."""
    torch.mm(b.t(), a.t(), out=out.t())


def _map(x: torch.Tensor, weight: torch.Tensor, bias: Maybe, out: torch.Tensor) -> None:
    """out = x weight^T + bias for one expert."""
    _multiply(x, weight.t(), out)
    if bias is not None:
        out += bias


def _activate_into(activation: Activation, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """mlp.activate without a new tensor."""
    if activation == "gelu":
        return torch.ops.aten.gelu.out(x, out=out)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu.out(x, approximate="tanh", out=out)
    if activation == "quick_gelu":
        return torch.mul(x, QUICK_GELU_SLOPE, out=out).sigmoid_().mul_(x)
    return torch.ops.aten.silu.out(x, out=out)


def _derive_in_place(activation: Activation, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad *= the derivative of mlp.activate at x."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
    if activation == "quick_gelu":  # quick_gelu(x) = silu(1.702 x) / 1.702
        return torch.ops.aten.silu_backward.grad_input(grad, x * QUICK_GELU_SLOPE, grad_input=grad)
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


class _ExpertsOnCpu(torch.autograd.Function):
    """(activation, rows [R, d_in], counts [E], *Weights) -> [R, d_out], each row through its own expert.

    An expert without rows is a product over nothing, whose gradient is zero.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, activation: Activation, rows: torch.Tensor, counts: torch.Tensor, *tensors: Maybe
    ) -> torch.Tensor:
        weights, sizes = Weights(*tensors), counts.tolist()
        pre = rows.new_empty(rows.shape[0], weights.up.shape[1])
        gated = torch.empty_like(pre) if weights.gate is not None else None
        hidden = torch.empty_like(pre)
        out = rows.new_empty(rows.shape[0], weights.down.shape[1])
        moving = (_by_rows(x, sizes) for x in (rows, pre, gated, hidden, out))
        for own, x, u, g, h, y in zip(_by_expert(weights, len(sizes)), *moving, strict=True):
            _map(x, own.up, own.up_bias, u)
            if g is None:
                _activate_into(activation, u, h)
            else:
                _map(x, own.gate, None, g)
                _activate_into(activation, g, h).mul_(u)
            _map(h, own.down, own.down_bias, y)
        ctx.activation = activation
        ctx.save_for_backward(rows, counts, pre, gated, hidden, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: torch.Tensor) -> tuple[Maybe, ...]:
        rows, counts, pre, gated, hidden, *tensors = ctx.saved_tensors
        weights, sizes = Weights(*tensors), counts.tolist()
        wanted = zip(tensors, ctx.needs_input_grad[3:], strict=True)
        grads = Weights(*(torch.empty_like(tensor) if need else None for tensor, need in wanted))
        grad_rows = torch.empty_like(rows)
        scratch = pre.new_empty(1 if gated is None else 3, max(sizes), pre.shape[1])
        moving = (_by_rows(x, sizes) for x in (rows, pre, gated, hidden, grad_out.contiguous(), grad_rows))
        both = _by_expert(weights, len(sizes)), _by_expert(grads, len(sizes))
        for own, grad, x, u, g, h, dy, dx in zip(*both, *moving, strict=True):
            du, *more = scratch[:, : x.shape[0]].unbind(0)
            _multiply(dy, own.down, du)
            if g is None:
                _derive_in_place(ctx.activation, du, u)
                _multiply(du, own.up, dx)
                _weight_gradients(grad, x, h, dy, du, None)
            else:
                activated, dg = more
                torch.mul(du, u, out=dg)
                _derive_in_place(ctx.activation, dg, g)
                du *= _activate_into(ctx.activation, g, activated)
                _multiply(du, own.up, dx)
                dx.addmm_(dg, own.gate)
                _weight_gradients(grad, x, h, dy, du, dg)
        return None, grad_rows, None, *grads


def _weight_gradients(
    grad: Weights, x: torch.Tensor, h: torch.Tensor, dy: torch.Tensor, du: torch.Tensor, dg: Maybe
) -> None:
    """Write one expert's gradients that are wanted, from its input x, hidden rows h and the gradients of its rows."""
    for weight, output, source in ((grad.up, du, x), (grad.gate, dg, x), (grad.down, dy, h)):
        if weight is not None:
            _multiply(output.t(), source, weight)
    for bias, output in ((grad.up_bias, du), (grad.down_bias, dy)):
        if bias is not None:
            torch.sum(output, 0, out=bias)


class _GroupedLinear(torch.autograd.Function):
    """rows [R, i] times weight [E, o, i] transposed, row by its own expert, through torch's grouped_mm -> [R, o]."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, counts, weight)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[Maybe, ...]:
        rows, counts, weight = ctx.saved_tensors
        ends = counts.cumsum(0, dtype=torch.int32)
        grad = grad.contiguous()
        grad_rows = F.grouped_mm(grad, weight, offs=ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[2]:
            return grad_rows, None, None
        grad_weight = F.grouped_mm(grad.t(), rows, offs=ends)
        # A group without rows is a product over nothing; not every kernel writes its zeros.
        return grad_rows, None, grad_weight.masked_fill_((counts == 0).view(-1, 1, 1), 0)


def _rows_of(bias: torch.Tensor, counts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """bias [E, d] -> [R, d], each row its expert's. A one-hot product: deterministic backward anywhere."""
    row = torch.arange(num_rows, device=counts.device)
    expert = torch.searchsorted(counts.cumsum(0), row, right=True)
    return F.one_hot(expert, counts.numel()).to(bias.dtype) @ bias


def grouped_experts(activation: Activation, rows: torch.Tensor, counts: torch.Tensor, weights: Weights) -> torch.Tensor:
    """What Experts computes, by grouped_mm and without a host sync: the path of accelerators."""
    up, up_bias, gate, down, down_bias = weights
    pre = _GroupedLinear.apply(rows, counts, up)
    if up_bias is not None:
        pre = pre + _rows_of(up_bias, counts, rows.shape[0])
    if gate is None:
        hidden = activate(activation, pre)
    else:
        hidden = activate(activation, _GroupedLinear.apply(rows, counts, gate)) * pre
    out = _GroupedLinear.apply(hidden, counts, down)
    return out if down_bias is None else out + _rows_of(down_bias, counts, rows.shape[0])


class Experts(nn.Module):
    """E feed-forward layers side by side; expert e is Mlp with weights up[e], gate[e], down[e] and biases.

    Sizes are read from the weights, so a part of the experts (dim 0) or of their hidden width (dim 1 of up and gate,
    dim 2 of down) works as well. For the latter `enter` is applied to the input rows and `reduce` to the down-product,
    before down_bias is added once.
    """

    def __init__(
        self, num_experts: int, d_in: int, hidden: int, d_out: int, activation: Activation, bias: bool
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.enter: Callable[[torch.Tensor], torch.Tensor] = identity
        self.reduce: Callable[[torch.Tensor], torch.Tensor] = identity
        gated = activation == "swiglu"
        if gated and bias:
            raise ValueError("swiglu experts have no biases: their names are up, gate and down alone")
        into, out_of = Role("matrix", d_in, hidden), Role("matrix", hidden, d_out)
        self.up = declare(nn.Parameter(torch.empty(num_experts, hidden, d_in)), into)
        self.gate = declare(nn.Parameter(torch.empty(num_experts, hidden, d_in)), into) if gated else None
        self.down = declare(nn.Parameter(torch.empty(num_experts, d_out, hidden)), out_of)
        self.up_bias = self.down_bias = None
        if bias:
            self.up_bias = nn.Parameter(torch.empty(num_experts, hidden))
            declare(self.up_bias, Role("vector", None, hidden, init="zeros"))
            self.down_bias = nn.Parameter(torch.empty(num_experts, d_out))
            declare(self.down_bias, Role("vector", None, d_out, init="zeros"))

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """rows [R, d_in] sorted by expert, counts [E] int64 rows of each expert -> [R, d_out]."""
        whole = self.reduce is identity
        weights = Weights(self.up, self.up_bias, self.gate, self.down, self.down_bias if whole else None)
        rows = self.enter(rows)
        if rows.device.type == "cpu":
            out = _ExpertsOnCpu.apply(self.activation, rows, counts, *weights)
        else:
            out = grouped_experts(self.activation, rows, counts, weights)
        if whole:
            return out
        out = self.reduce(out)
        return out if self.down_bias is None else out + _rows_of(self.down_bias, counts, rows.shape[0])
