"""The router of a sparse layer: which experts a token visits, with which weights, and the two router losses.

Everything here is float32: bf16 logits tie often enough to change the chosen expert (ST-MoE, arXiv:2202.08906).
The losses are sums over this call's valid tokens, divided by constants that are known before the forward, so the sum
over micro-batches and ranks does not depend on how the global batch was split.

Letters: N tokens of this call, S leading rows (packs or images), E experts, k = top_k, d width.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mmtrain.config.schema import Moe
from mmtrain.mup.roles import Role, declare


class RouterInput(NamedTuple):
    """What a sparse layer must know of the whole global batch before its forward."""

    load_share: torch.Tensor
    """[E] fp32: each expert's share of all choices in the previous step's global batch; sums to 1."""
    valid_total: torch.Tensor
    """[] fp32: valid tokens of this part in the global batch, over all ranks and micro-batches."""
    bias: torch.Tensor
    """[E] fp32: the loss-free bias (arXiv:2408.15664); zeros unless balance is `bias`."""


class Choice(NamedTuple):
    """What the router says of N tokens."""

    logits: torch.Tensor
    """[N, E] fp32."""
    expert_ids: torch.Tensor
    """[N, k] int64, the k different experts of each token."""
    gates: torch.Tensor
    """[N, k] fp32, their weights; each row sums to 1 unless the layer does not renormalise."""


class RouterLosses(NamedTuple):
    """What `losses` says of this call's valid tokens. The losses are raw, without coefficient."""

    balance: torch.Tensor
    """[] fp32."""
    z: torch.Tensor
    """[] fp32."""
    counts: torch.Tensor
    """[E] fp32: choices of each expert, all k of them; detached."""
    probability: torch.Tensor
    """[E] fp32: sum over the tokens of each expert's probability; detached."""


class Router(nn.Module):
    """A linear map from the residual stream to expert logits, in float32 whatever the model computes in."""

    def __init__(self, d_in: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_in))
        declare(self.weight, Role("router", d_in, num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, d] -> logits [N, E] fp32."""
        return F.linear(x.float(), self.weight.float())


def choose(moe: Moe, logits: torch.Tensor, bias: torch.Tensor) -> Choice:
    """The top_k experts of each token. Gates are the softmax over all experts, renormalised over the chosen ones.

    That renormalised softmax is the softmax of the chosen logits alone, which is how it is computed here. Without
    `renormalize` gates are the chosen entries of the softmax over all experts. With
    `balance: bias` the bias [E] takes part in the selection and not in the gates (arXiv:2408.15664, eq. 3).
    """
    ranking = logits.detach().softmax(-1) + bias if moe.balance == "bias" else logits.detach()
    expert_ids = ranking.topk(moe.top_k, dim=-1).indices
    if moe.renormalize:
        return Choice(logits, expert_ids, logits.gather(-1, expert_ids).softmax(-1))
    return Choice(logits, expert_ids, logits.softmax(-1).gather(-1, expert_ids))


def losses(moe: Moe, choice: Choice, valid: torch.Tensor, router_input: RouterInput) -> RouterLosses:
    """Losses and sums of the tokens that `valid` [S, L] marks; S * L = N.

    z        sum_t lse(logits_t)^2 / valid_total                                   (arXiv:2202.08906, eq. 5)
    balance  step: E * sum_e load_share_e * (sum_t p_te / valid_total)             (arXiv:2101.03961, eq. 4-6)
             sequence: sum_s (valid tokens of s / valid_total) * E * sum_e f_se * p_se, with f_se the share of
             choices and p_se the mean probability inside leading row s
    """
    num_experts = choice.logits.shape[-1]
    weight = valid.reshape(-1).to(choice.logits.dtype)
    total = router_input.valid_total.clamp(min=1)  # a global batch without a valid token has losses of 0
    log_sum = choice.logits.logsumexp(-1)
    z = (weight * log_sum.square()).sum() / total
    chosen = torch.zeros_like(choice.logits).scatter_(-1, choice.expert_ids, 1.0)
    counts = weight @ chosen
    probabilities = (choice.logits - log_sum.unsqueeze(-1)).exp()
    probability = weight @ probabilities
    if moe.balance != "loss":
        return RouterLosses(torch.zeros_like(z), z, counts, probability.detach())
    if moe.balance_scope == "step":
        balance = router_input.load_share @ probability
    else:
        rows = valid.shape[0], -1, num_experts
        weighted = weight.view(valid.shape).unsqueeze(1)  # [S, 1, L]
        tokens = weighted.sum(-1)  # [S, 1]
        chosen_sum = (weighted @ chosen.view(rows)).squeeze(1)
        probability_sum = (weighted @ probabilities.view(rows)).squeeze(1)
        balance = (chosen_sum * probability_sum / (moe.top_k * tokens.clamp(min=1))).sum()
    return RouterLosses(num_experts * balance / total, z, counts, probability.detach())
