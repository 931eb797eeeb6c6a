"""Gradient norms by token kind, as numbers that a backward leaves behind: no hook, no module state."""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from mmtrain.config.tokens import TokenKind

KINDS = (TokenKind.TEXT, TokenKind.IMAGE)
"""Padding has no gradient."""


class GradientProbe:
    """Squares of the loss gradient where it is laid on, summed by token kind over the micro-batches of one step.

    Positions of different packs never share a gradient, so the sums of all ranks and micro-batches add up to those of
    the global batch. Not a tensor itself: DeepSpeed puts hooks on tensors among a forward's inputs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._squares = torch.zeros(len(KINDS), dtype=torch.float64, device=device, requires_grad=True)

    def __call__(self, x: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """x [B, T, d] itself, whose gradient is looked at in backward; kind [B, T] TokenKind."""
        return _Probe.apply(x, kind, self._squares)

    def squares(self) -> torch.Tensor:
        """[len(KINDS)] fp64: the sums so far, of the loss as it was handed to backward."""
        found = self._squares.grad
        return torch.zeros_like(self._squares, requires_grad=False) if found is None else found


class _Probe(torch.autograd.Function):
    """Identity; the "gradient" of `squares` is what backward saw."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, kind: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(kind)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        (kind,) = ctx.saved_tensors
        at = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32).double().square()
        return grad, None, torch.stack([(at * (kind == one)).sum() for one in KINDS])
