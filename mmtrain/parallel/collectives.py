"""The autograd functions of tensor and expert parallelism that megatron-core has only for CUDA, or writes in place.

enter        identity forward, sum over the group backward: in front of a computation that is split over the group.
reduce       sum over the group forward, identity backward: behind such a computation.
exchange     rows to and from the ranks of the group, uneven, both directions.

Of a sequence whose positions (dimension 1) are spread over the group in equal runs:

own_run      this rank's run of what every rank holds whole, and back.
gather       the whole of it, for a computation that every rank does alike.
gather_split the whole of it, for one that is split over the group: `gather`, then `enter`, at the price of one.
scatter      the sum over the group, of which each rank keeps its run: `reduce`, then `own_run`, at the price of one.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

Map = Callable[[torch.Tensor, dist.ProcessGroup], torch.Tensor]
"""One tensor of every rank -> one tensor on every rank, linear."""


class _Linear(torch.autograd.Function):
    """A linear map over the group forward, another backward: its transpose, for the gradients that the ranks hold."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, group: dist.ProcessGroup, there: Map, back: Map) -> torch.Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def _same(x: torch.Tensor, _: dist.ProcessGroup) -> torch.Tensor:
    return x.view_as(x)


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
    dist.all_reduce(total, group=group)
    return total


def _run(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, T, d] -> this rank's [B, T / size, d], in memory of its own: the whole may then be freed."""
    return x.chunk(group.size(), 1)[group.rank()].clone(memory_format=torch.contiguous_format)


def _join_runs(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's [B, T / size, d] -> [B, T, d]."""
    runs = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(runs.flatten(0, 1), x.contiguous(), group=group)
    return runs.transpose(0, 1).flatten(1, 2)


def _sum_run(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's x [B, T, d] -> this rank's run [B, T / size, d] of their sum."""
    runs = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    total = torch.empty_like(runs[0])
    dist.reduce_scatter_tensor(total, runs.flatten(0, 1), group=group)
    return total


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.arguments = (receive, send, group)
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.arguments), None, None, None


def _all_to_all(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def enter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x itself; its gradient is the sum of the group's gradients."""
    return _Linear.apply(x, group, _same, _sum)


def reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the group's x; the gradient passes as it is."""
    return _Linear.apply(x, group, _sum, _same)


def exchange(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """rows [sum(send), d], in the order of the group's ranks -> [sum(receive), d], in the order of their senders.

    send     rows for each rank of the group.
    receive  rows from each rank of the group.
    Every rank of the group must take part, with or without rows, in the forward and in the backward.
    """
    return _Exchange.apply(rows, send, receive, group)


def own_run(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, T, d], the same on every rank -> this rank's positions [B, T / size, d]; the gradient is gathered."""
    return _Linear.apply(x, group, _run, _join_runs)


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, T / size, d] of every rank -> [B, T, d]; of its gradient, the same on every rank, each keeps its run."""
    return _Linear.apply(x, group, _join_runs, _run)


def gather_split(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, T / size, d] of every rank -> [B, T, d]; each rank gets its run of the sum of the group's gradients."""
    return _Linear.apply(x, group, _join_runs, _sum_run)


def scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [B, T, d] -> this rank's run [B, T / size, d] of the sum of the group's x; the gradient is gathered."""
    return _Linear.apply(x, group, _sum_run, _join_runs)
