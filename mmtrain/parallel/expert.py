"""Experts of a layer spread over the ranks of an expert group: rows travel to their experts and back (all-to-all).

Rank r of the group holds experts [r * E / size, (r + 1) * E / size). Rows leave sorted by expert, so what one rank
gets from another is one contiguous run, sorted by its own experts.
"""

import torch
import torch.distributed as dist
from torch import nn

from mmtrain.config.errors import ConfigError
from mmtrain.model.experts import Experts
from mmtrain.model.moe import SparseMlp, combine_rows, gather_rows, sort_by_expert
from mmtrain.parallel.collectives import exchange
from mmtrain.parallel.groups import Groups


class AllToAllDispatcher:
    """Takes tokens to experts on other ranks (see mmtrain.model.moe.Dispatcher)."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.size = dist.get_world_size(group)

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        """x [N, d_in], expert_ids [N, k], gates [N, k] -> [N, d_out]; every rank of the group must call it.

        One host sync a layer: the row counts, which decide the sizes of the messages.
        """
        order = sort_by_expert(expert_ids, self.num_experts)
        sent = order.counts.view(self.size, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        send, receive = torch.stack((sent.sum(1), received.sum(1))).tolist()
        rows = exchange(gather_rows(x, order), send, receive, self.group)
        by_expert = sort_by_expert(_expert_of_rows(received), received.shape[1])
        out = _Permute.apply(
            experts(_Permute.apply(rows, by_expert.source, by_expert.position[:, 0]), by_expert.counts),
            by_expert.position[:, 0],
            by_expert.source,
        )
        return combine_rows(exchange(out, receive, send, self.group), gates, order)


class _Permute(torch.autograd.Function):
    """rows [R, d] -> rows[index]; backward indexes with the inverse, so it adds nothing up."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _expert_of_rows(received: torch.Tensor) -> torch.Tensor:
    """received [senders, local experts] -> [R, 1]: the local expert of each row, in the order of arrival."""
    experts = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    return experts.repeat_interleave(received.reshape(-1)).unsqueeze(1)


def spread(model: nn.Module, groups: Groups) -> None:
    """Give every sparse layer of `model` an all-to-all dispatcher; its weights are cut by parallel.tensor.shard."""
    for name, module in model.named_modules():
        if isinstance(module, SparseMlp):
            if module.moe.num_experts % groups.mesh.expert:
                raise ConfigError(
                    f"parallel.expert = {groups.mesh.expert} does not divide the {module.moe.num_experts} experts of "
                    f"{name}"
                )
            module.dispatcher = AllToAllDispatcher(module.moe.num_experts, groups.expert)
