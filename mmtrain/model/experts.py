"""All experts of a sparse layer as three-dimensional weights, and their matrix products over sorted rows.

One autograd function computes activation(rows up^T) down^T for every expert: on a CPU expert by expert, into slices of
preallocated tensors, so that an expert's hidden rows are still in the cache when they are used; on an accelerator with
torch's grouped_mm, which never asks the host how many rows an expert has.

Weights are saved for backward as the parameters themselves, never as views: ZeRO-3 swaps `parameter.data` after the
forward and back before the backward, and a saved parameter follows while a view would keep the gathered memory alive.

Letters: R rows sorted by expert, E experts, f hidden width, d_in and d_out outer widths.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from mmtrain.model.mlp import QUICK_GELU_SLOPE, Activation, activate
from mmtrain.mup.roles import Role, declare

Maybe = torch.Tensor | None


def identity(x: torch.Tensor) -> torch.Tensor:
    """The hook of an expert that is not cut across ranks."""
    return x


def activation_backward(activation: Activation, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad times the derivative of `activate(activation, .)` at x."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if activation == "quick_gelu":  # quick_gelu(x) = silu(1.702 x) / 1.702
        return torch.ops.aten.silu_backward(grad, x * QUICK_GELU_SLOPE)
    return torch.ops.aten.silu_backward(grad, x)


def slices(counts: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows; reads counts on the host, so only where that costs nothing."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _ExpertProducts(torch.autograd.Function):
    """(rows [R, d_in], counts [E]) -> activation(rows up^T + up_bias) down^T, each row with its expert's weights."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        activation: Activation,
        rows: torch.Tensor,
        counts: torch.Tensor,
        up: torch.Tensor,
        up_bias: Maybe,
        gate: Maybe,
        down: torch.Tensor,
    ) -> torch.Tensor:
        pre = rows.new_empty(rows.shape[0], up.shape[1])
        gated = torch.empty_like(pre) if gate is not None else None
        hidden = torch.empty_like(pre)
        out = rows.new_empty(rows.shape[0], down.shape[1])
        for e, own in slices(counts):
            torch.mm(rows[own], up[e].t(), out=pre[own])
            if up_bias is not None:
                pre[own] += up_bias[e]
            if gate is None:
                hidden[own] = activate(activation, pre[own])
            else:
                torch.mm(rows[own], gate[e].t(), out=gated[own])
                torch.mul(F.silu(gated[own]), pre[own], out=hidden[own])
            torch.mm(hidden[own], down[e].t(), out=out[own])
        ctx.activation = activation
        ctx.has_bias = up_bias is not None
        ctx.save_for_backward(rows, counts, up, gate, down, pre, gated, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: torch.Tensor) -> tuple[Maybe, ...]:
        rows, counts, up, gate, down, pre, gated, hidden = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_rows = torch.zeros_like(rows)
        grad_up, grad_down = torch.zeros_like(up), torch.zeros_like(down)
        grad_bias = up.new_zeros(up.shape[:2]) if ctx.has_bias else None
        grad_gate = torch.zeros_like(gate) if gate is not None else None
        for e, own in slices(counts):
            torch.mm(grad_out[own].t(), hidden[own], out=grad_down[e])
            grad_hidden = grad_out[own] @ down[e]
            if gate is None:
                grad_pre = activation_backward(ctx.activation, grad_hidden, pre[own])
            else:
                grad_pre = grad_hidden * F.silu(gated[own])
                grad_gated = torch.ops.aten.silu_backward(grad_hidden * pre[own], gated[own])
                torch.mm(grad_gated.t(), rows[own], out=grad_gate[e])
                torch.mm(grad_gated, gate[e], out=grad_rows[own])
            torch.mm(grad_pre.t(), rows[own], out=grad_up[e])
            if grad_bias is not None:
                torch.sum(grad_pre, 0, out=grad_bias[e])
            grad_rows[own] += grad_pre @ up[e]
        return None, grad_rows, None, grad_up, grad_bias, grad_gate, grad_down


class _AddExpertBias(torch.autograd.Function):
    """x [R, d] plus, to each row, its expert's row of bias [E, d]."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, counts: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(counts, bias)
        out = torch.empty_like(x)
        for e, own in slices(counts):
            torch.add(x[own], bias[e], out=out[own])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[Maybe, ...]:
        counts, bias = ctx.saved_tensors
        grad_bias = torch.zeros_like(bias)
        for e, own in slices(counts):
            torch.sum(grad[own], 0, out=grad_bias[e])
        return grad, None, grad_bias


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
        rows = self.enter(rows)
        out = _ExpertProducts.apply(self.activation, rows, counts, self.up, self.up_bias, self.gate, self.down)
        out = self.reduce(out)
        return out if self.down_bias is None else _AddExpertBias.apply(out, counts, self.down_bias)
