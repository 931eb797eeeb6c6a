"""The language head cut along the vocabulary: loss without the whole logits on any rank, and whole logits on request.

Letters: R rows, S sources, d width, V vocabulary entries, v rows of the (padded) vocabulary on this rank.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mmtrain.model.loss import CHUNK_LOGITS, LanguageHead


class _CrossEntropy(torch.autograd.Function):
    """(hidden [R, d], weight [v, d], labels [R], weights [R]) -> (sum of weights * ce [], ce [R] detached).

    The counterpart of mmtrain.model.loss._CrossEntropy, with three small all-reduces a chunk (maximum, sum of
    exponentials, logit of the label) and one of hidden's gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        start: int,
        vocab_size: int,
        group: dist.ProcessGroup,
        learning: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ce = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        needed = learning and any(ctx.needs_input_grad[:2])
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needed else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed else None
        rows = max(1, CHUNK_LOGITS // weight.shape[0])
        for first in range(0, hidden.shape[0], rows):
            part = slice(first, first + rows)
            logits = _local_logits(hidden[part], weight, start, vocab_size)
            label = labels[part] - start
            mine = (label >= 0) & (label < weight.shape[0])
            label = label.clamp(0, weight.shape[0] - 1).unsqueeze(1)
            top = logits.amax(-1, keepdim=True)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            exponentials = logits.sub_(top).exp()
            both = torch.stack((exponentials.sum(-1), logits.gather(1, label).squeeze(1).masked_fill(~mine, 0.0)))
            dist.all_reduce(both, group=group)
            ce[part] = both[0].log() - both[1]
            if not needed:
                continue
            grad = exponentials.div_(both[0].unsqueeze(1))
            grad.scatter_add_(1, label, -mine.unsqueeze(1).to(grad.dtype))
            grad = grad.mul_(weights[part].unsqueeze(1)).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += grad.t() @ hidden[part]
        if needed:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(ce)
        return weights @ ce, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            (grad_hidden * grad).to(hidden_dtype),
            (grad_weight * grad).to(weight_dtype),
            *(None,) * 6,
        )


def _local_logits(hidden: torch.Tensor, weight: torch.Tensor, start: int, vocab_size: int) -> torch.Tensor:
    """hidden [R, d] -> logits [R, v] fp32 of this rank's rows; -inf for rows that only pad the vocabulary."""
    logits = (hidden @ weight.t()).float()
    real = max(0, min(vocab_size - start, weight.shape[0]))
    logits[:, real:] = -torch.inf
    return logits


class VocabularyHead(LanguageHead):
    """LanguageHead whose rows are spread over the ranks of `group`; same inputs, same outputs, on every rank."""

    def __init__(self, head: LanguageHead, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        """weight [v, d]: this rank's rows."""
        nn.Module.__init__(self)  # its weight is made already
        self.weight = weight
        self.vocab_size, self.scale = head.vocab_size, head.scale
        self.group = group
        self.start = group.rank() * weight.shape[0]

    def cross_entropy(
        self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See LanguageHead.cross_entropy."""
        learning = torch.is_grad_enabled()  # inside a Function it is always off
        return _CrossEntropy.apply(
            hidden, self.weight, labels, weights, self.start, self.vocab_size, self.group, learning
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, d] -> logits [R, V] fp32, whole on every rank; without gradients."""
        with torch.no_grad():
            local = _local_logits(hidden * self.scale, self.weight, self.start, self.vocab_size)
            parts = [torch.empty_like(local) for _ in range(self.group.size())]
            dist.all_gather(parts, local, group=self.group)
            return torch.cat(parts, -1)[:, : self.vocab_size]
