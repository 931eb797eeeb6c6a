"""Language head and loss in one module, so that ZeRO-3 gathers the weight once and tensor parallelism swaps it whole.

Letters: R rows (positions), S sources, d width, V vocabulary entries, without the padding of the stored weight.
"""

import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mmtrain.model.parameter import EMBEDDING_STD, parameter
from mmtrain.mup.roles import Role

CHUNK_LOGITS = 1 << 22
"""Logits that exist at once, in entries (16 MiB in fp32)."""


class _CrossEntropy(torch.autograd.Function):
    """(hidden [R, d], weight [padded, d], labels [R], weights [R]) -> (sum of weights * ce [], ce [R] detached).

    The gradient of a chunk's logits is made while they exist, in the forward, and only multiplied by the incoming
    scalar in backward: three matrix products instead of the four that recomputing the logits would take, and the same
    peak, since backward would start by making grad_weight while every activation is still alive.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        vocab_size: int,
        learning: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        real = weight[:vocab_size]
        ce = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learning and ctx.needs_input_grad[0] else None
        grad_weight = None
        if learning and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        rows = max(1, CHUNK_LOGITS // vocab_size)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ real.t()).float()
            label = labels[part].unsqueeze(1)
            log_sum = logits.logsumexp(-1, keepdim=True)
            ce[part] = (log_sum - logits.gather(1, label)).squeeze(1)
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(log_sum).exp_()
            grad.scatter_add_(1, label, grad.new_full((1, 1), -1.0).expand_as(label))
            grad = grad.mul_(weights[part].unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, real, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight[:vocab_size], grad.t(), hidden[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce)
        return weights @ ce, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, accumulated in fp32 whatever the factors are."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class LanguageHead(nn.Module):
    """Hidden states to logits, or straight to the summed loss without ever holding the logits of all positions."""

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        padded_vocab: int,
        scale: float = 1.0,
        tied: nn.Parameter | None = None,
    ) -> None:
        """scale: factor on all logits (muP). tied: the embedding's weight, to share it."""
        super().__init__()
        if tied is None:
            role = Role("head", d_model, vocab_size, std=EMBEDDING_STD, rows=vocab_size)
            tied = parameter((padded_vocab, d_model), role)
        self.weight = tied
        self.vocab_size = vocab_size
        self.scale = scale

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        source_ids: torch.Tensor | None = None,
        num_sources: int = 1,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Without labels: logits [R, V] in fp32. With them: language_sum [], by_source_sum [S], by_source_weight [S].

        hidden [R, d]; labels, source_ids [R] int64; weights [R] fp32. language_sum = sum of weights * cross-entropy
        and carries the gradient; the other two are detached. Rows of weight 0 are left out of all work.
        """
        if labels is None:
            return self.logits(hidden)
        rows = weights.nonzero().squeeze(1)
        hidden = hidden.index_select(0, rows)
        labels, weights, source_ids = labels[rows], weights[rows], source_ids[rows]
        if self.scale != 1.0:
            hidden = hidden * self.scale
        language_sum, ce = self.cross_entropy(hidden, labels, weights)
        of_source = (torch.arange(num_sources, device=rows.device).unsqueeze(1) == source_ids).float()
        return language_sum, of_source @ (weights * ce), of_source @ weights

    def cross_entropy(
        self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled hidden [R, d], labels [R], weights [R] -> (sum of weights * ce [], ce [R] detached)."""
        learning = torch.is_grad_enabled()  # inside a Function it is always off
        return _CrossEntropy.apply(hidden, self.weight, labels, weights, self.vocab_size, learning)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, d] -> logits [R, V] fp32; the padded rows of the weight have none."""
        return ((hidden * self.scale) @ self.weight[: self.vocab_size].t()).float()
