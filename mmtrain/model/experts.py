"""All experts of a sparse layer as three-dimensional weights, and their matrix products over sorted rows.

On a CPU one autograd function runs expert by expert, forward and backward, into slices of preallocated tensors: an
expert's hidden rows are used while they are in the cache and then overwritten by the next expert's, because fresh
memory costs page faults (2 us each, measured) and a concatenation costs a copy. Backward recomputes the activation from
its input for the same reason. On an accelerator the products are torch's grouped_mm, which never asks the host how many
rows an expert has.

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


def _slices(counts: torch.Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows; reads `counts` on the host, so for CPU tensors only."""
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < b]


def _scratch(counts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[rows of the busiest expert, width of `like`]: memory that one expert after the other uses."""
    return like.new_empty(int(counts.max()), like.shape[1])


def _product(x: torch.Tensor, weight: torch.Tensor, bias: Maybe, out: torch.Tensor) -> None:
    """out = x weight^T + bias for one expert."""
    torch.mm(x, weight.t(), out=out)
    if bias is not None:
        out += bias


def _activate_into(activation: Activation, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """mlp.activate without a new tensor."""
    if activation == "gelu":
        return torch.ops.aten.gelu.out(x, out=out)
    if activation == "quick_gelu":
        return torch.mul(x, QUICK_GELU_SLOPE, out=out).sigmoid_().mul_(x)
    return torch.ops.aten.silu.out(x, out=out)


def _derive_in_place(activation: Activation, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad *= the derivative of mlp.activate at x."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    if activation == "quick_gelu":  # quick_gelu(x) = silu(1.702 x) / 1.702
        return torch.ops.aten.silu_backward.grad_input(grad, x * QUICK_GELU_SLOPE, grad_input=grad)
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


class _ExpertsOnCpu(torch.autograd.Function):
    """(activation, rows [R, d_in], counts [E], *Weights) -> [R, d_out], each row through its own expert."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, activation: Activation, rows: torch.Tensor, counts: torch.Tensor, *weights: Maybe
    ) -> torch.Tensor:
        up, up_bias, gate, down, down_bias = Weights(*weights)
        pre = rows.new_empty(rows.shape[0], up.shape[1])
        gated = torch.empty_like(pre) if gate is not None else None
        out = rows.new_empty(rows.shape[0], down.shape[1])
        scratch = _scratch(counts, pre)
        for e, own in _slices(counts):
            hidden = scratch[: own.stop - own.start]
            _product(rows[own], up[e], None if up_bias is None else up_bias[e], pre[own])
            if gate is None:
                _activate_into(activation, pre[own], hidden)
            else:
                _product(rows[own], gate[e], None, gated[own])
                _activate_into(activation, gated[own], hidden).mul_(pre[own])
            _product(hidden, down[e], None if down_bias is None else down_bias[e], out[own])
        ctx.activation = activation
        ctx.save_for_backward(rows, counts, pre, gated, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[Maybe, ...]:
        rows, counts, pre, gated, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        wanted = ctx.needs_input_grad[3:]
        grads = Weights(*(torch.empty_like(w) if need else None for w, need in zip(weights, wanted, strict=True)))
        up, _, gate, down, _ = Weights(*weights)
        scratch = [_scratch(counts, pre) for _ in range(2 if gate is None else 3)]
        for e, own in _slices(counts):
            hidden, grad_pre, *grad_gated = (buffer[: own.stop - own.start] for buffer in scratch)
            x, u, dy = rows[own], pre[own], grad[own]
            torch.mm(dy, down[e], out=grad_pre)
            if gate is None:
                _activate_into(ctx.activation, u, hidden)
                _derive_in_place(ctx.activation, grad_pre, u)
            else:
                g = gated[own]
                _activate_into(ctx.activation, g, hidden)
                torch.mul(grad_pre, u, out=grad_gated[0])
                _derive_in_place(ctx.activation, grad_gated[0], g)
                grad_pre *= hidden
                hidden *= u
            _weight_gradients(grads, e, x, hidden, grad_pre, grad_gated[0] if grad_gated else None, dy)
            if grad_rows is not None:
                torch.mm(grad_pre, up[e], out=grad_rows[own])
                if gate is not None:
                    grad_rows[own].addmm_(grad_gated[0], gate[e])
        _clear_unused(grads, counts)
        return None, grad_rows, None, *grads


def _weight_gradients(
    grads: Weights,
    e: int,
    x: torch.Tensor,
    hidden: torch.Tensor,
    grad_pre: torch.Tensor,
    grad_gated: Maybe,
    dy: torch.Tensor,
) -> None:
    """Write expert e's slices of the gradients that are wanted."""
    if grads.up is not None:
        torch.mm(grad_pre.t(), x, out=grads.up[e])
    if grads.up_bias is not None:
        torch.sum(grad_pre, 0, out=grads.up_bias[e])
    if grads.gate is not None:
        torch.mm(grad_gated.t(), x, out=grads.gate[e])
    if grads.down is not None:
        torch.mm(dy.t(), hidden, out=grads.down[e])
    if grads.down_bias is not None:
        torch.sum(dy, 0, out=grads.down_bias[e])


def _clear_unused(grads: Weights, counts: torch.Tensor) -> None:
    """Zero the gradients of experts without rows: the other slices were written in full."""
    for e in (counts == 0).nonzero().flatten().tolist():
        for gradient in grads:
            if gradient is not None:
                gradient[e].zero_()


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
