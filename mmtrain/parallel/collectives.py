"""The autograd functions of tensor and expert parallelism that megatron-core has only for CUDA, or writes in place.

enter      identity forward, sum over the group backward: in front of a computation that is split over the group.
reduce     sum over the group forward, identity backward: behind such a computation.
exchange   rows to and from the ranks of the group, uneven, both directions.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)  # autograd may hand the same tensor to others
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


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
    return _Enter.apply(x, group)


def reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of the group's x; the gradient passes as it is."""
    return _Reduce.apply(x, group)


def exchange(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """rows [sum(send), d], in the order of the group's ranks -> [sum(receive), d], in the order of their senders.

    send     rows for each rank of the group.
    receive  rows from each rank of the group.
    Every rank of the group must take part, with or without rows, in the forward and in the backward.
    """
    return _Exchange.apply(rows, send, receive, group)
