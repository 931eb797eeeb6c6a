"""Sparse mixture-of-experts feed-forward layer (arXiv:1701.06538), dropless; one for vision, connector and decoder.

    route -> gather rows by expert -> experts -> weighted sum back to tokens, plus what a shared expert makes of them

k identical experts with any router are exactly the dense Mlp, because gates sum to 1. Only a Dispatcher knows where
experts live; parallel/ supplies one that sends rows to other ranks and reuses the sort and the two moves of this file.

Letters: N tokens, k experts of a token, R = N * k rows, E experts, S leading rows (packs or images).
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from mmtrain.config.schema import Moe
from mmtrain.model.experts import Experts
from mmtrain.model.mlp import Activation, Mlp
from mmtrain.model.router import Router, RouterInput, choose, losses


class Order(NamedTuple):
    """Rows sorted by expert; inside one expert in the order of tokens, so that results are deterministic."""

    source: torch.Tensor
    """[R] int64: sorted row r is choice source[r] of the flattened [N, k] choices."""
    position: torch.Tensor
    """[N, k] int64: where each choice went; the inverse of source."""
    counts: torch.Tensor
    """[E] int64: rows of each expert."""


def sort_by_expert(expert_ids: torch.Tensor, num_experts: int) -> Order:
    """The order of choices expert_ids [N, k] by expert, without a host sync."""
    flat = expert_ids.reshape(-1)
    source = torch.argsort(flat, stable=True)
    position = torch.empty_like(source)
    position[source] = torch.arange(source.numel(), device=source.device)
    ends = torch.searchsorted(flat[source], torch.arange(num_experts, device=flat.device), right=True)
    return Order(source, position.view(expert_ids.shape), ends.diff(prepend=ends.new_zeros(1)))


# torch's embedding_bag is a gather, weight and sum in one pass over memory; the same steps one by one take 3 to 17
# times as long on a CPU, most of that for fresh memory.


class _Gather(torch.autograd.Function):
    """x [N, d] -> rows [R, d]. Backward sums a token's k rows in the order of its choices."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.save_for_backward(order.position)
        return x.index_select(0, order.source // order.position.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (position,) = ctx.saved_tensors
        return F.embedding_bag(position, grad.contiguous(), mode="sum"), None


class _Combine(torch.autograd.Function):
    """(rows [R, d], gates [N, k]) -> y [N, d], y_n = sum_j gates_nj * rows[position_nj]."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: torch.Tensor, gates: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.save_for_backward(rows, gates, order.source, order.position)
        return F.embedding_bag(order.position, rows, per_sample_weights=gates, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, gates, source, position = ctx.saved_tensors
        num_tokens, top_k = position.shape
        grad = grad.contiguous()
        flat = torch.arange(position.numel(), device=position.device)
        grad_gates = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad, rows, position.reshape(-1), flat[::top_k].contiguous(), flat // top_k, 0
        )
        weights = gates.reshape(-1, 1)[source]
        grad_rows = F.embedding_bag((source // top_k).unsqueeze(1), grad, per_sample_weights=weights, mode="sum")
        return grad_rows, grad_gates.view(num_tokens, top_k), None


def gather_rows(x: torch.Tensor, order: Order) -> torch.Tensor:
    """x [N, d] -> rows [R, d] sorted by expert, each token k times."""
    return _Gather.apply(x, order)


def combine_rows(rows: torch.Tensor, gates: torch.Tensor, order: Order) -> torch.Tensor:
    """rows [R, d] sorted by expert -> [N, d]: the sum of a token's k rows, weighted by gates [N, k]."""
    return _Combine.apply(rows, gates.to(rows.dtype), order)


class Dispatcher(Protocol):
    """Takes tokens to their experts and back."""

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """x [N, d_in], expert_ids [N, k] int64, gates [N, k] fp32 -> [N, d_out]: sum over k of gate * expert(x)."""
        ...


class LocalDispatcher:
    """The dispatcher of a process that holds every expert."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """See Dispatcher."""
        order = sort_by_expert(expert_ids, self.num_experts)
        return combine_rows(experts(gather_rows(x, order), order.counts), gates, order)


class Routed(NamedTuple):
    """What a sparse layer returns. Losses are raw, without coefficients; see router.losses for their formulas."""

    out: torch.Tensor
    """[..., d_out], leading shape of the input."""
    balance: torch.Tensor
    """[] fp32."""
    z: torch.Tensor
    """[] fp32."""
    counts: torch.Tensor
    """[E] fp32: choices by valid tokens, all k of them; detached."""
    probability: torch.Tensor
    """[E] fp32: sum over valid tokens of each expert's probability; detached."""


class SparseMlp(nn.Module):
    """Takes the place of Mlp: shared(x) + routed_scale * the weighted sum of each token's top_k of num_experts."""

    def __init__(self, moe: Moe, d_in: int, hidden: int, d_out: int, activation: Activation, bias: bool) -> None:
        """hidden: of the dense MLP; an expert has 1 / granularity of it."""
        super().__init__()
        width = moe.expert_width(hidden)
        self.moe = moe
        self.router = Router(d_in, moe.num_experts)
        self.experts = Experts(moe.num_experts, d_in, width, d_out, activation, bias)
        self.shared = Mlp(d_in, moe.shared * width, d_out, activation, bias) if moe.shared else None
        self.dispatcher: Dispatcher = LocalDispatcher(moe.num_experts)

    def forward(self, x: torch.Tensor, valid: torch.Tensor, router_input: RouterInput) -> Routed:
        """x [S, L, d_in] or [N, d_in] (one leading row), valid bool of the same leading shape.

        Every token gets an output; the losses and counts see the valid ones.
        """
        tokens = x.reshape(-1, x.shape[-1])
        choice = choose(self.moe, self.router(tokens), router_input.bias)
        out = self.dispatcher(tokens, choice.expert_ids, choice.gates * self.moe.routed_scale, self.experts)
        if self.shared is not None:
            out = out + self.shared(tokens)
        leading_rows = valid if valid.dim() > 1 else valid.unsqueeze(0)
        return Routed(out.view(*x.shape[:-1], -1), *losses(self.moe, choice, leading_rows, router_input))
