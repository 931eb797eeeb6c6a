"""One pre-norm transformer block, dense or sparse, for the image encoder and the decoder."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config.schema import Moe
from mmtrain.model.attention import Attention, View
from mmtrain.model.mlp import Activation, Mlp
from mmtrain.model.moe import SparseMlp
from mmtrain.model.router import RouterInput
from mmtrain.model.stepio import PartRouterInput, RouterStats, summarise


def feed_forward(
    moe: Moe, sparse: bool, d_in: int, hidden: int, d_out: int, activation: Activation, bias: bool
) -> Mlp | SparseMlp:
    """The MLP of a layer: experts where the layer is sparse."""
    if sparse:
        return SparseMlp(moe, d_in, hidden, d_out, activation, bias)
    return Mlp(d_in, hidden, d_out, activation, bias)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, norm1: nn.Module, attention: Attention, norm2: nn.Module, mlp: Mlp | SparseMlp) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp

    def forward(
        self, x: torch.Tensor, view: View, layer: int, valid: torch.Tensor, router: RouterInput | None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """x [S, L, d], valid [S, L] bool -> x [S, L, d] and, of a sparse block, what its router reports."""
        x = x + self.attention(self.norm1(x), view, layer)
        inner = self.norm2(x)
        if router is None:
            return x + self.mlp(inner), None
        routed = self.mlp(inner, valid, router)
        return x + routed.out, RouterStats(*routed[1:])


def run_blocks(
    blocks: nn.ModuleList,
    x: torch.Tensor,
    view: View,
    valid: torch.Tensor,
    routers: PartRouterInput | None,
    recompute: bool,
) -> tuple[torch.Tensor, RouterStats | None]:
    """x [S, L, d] through all blocks; `recompute` keeps only each block's input for the backward."""
    reports: list[RouterStats] = []
    for layer, block in enumerate(blocks):
        router = routers.layer(len(reports)) if isinstance(block.mlp, SparseMlp) else None
        if recompute and torch.is_grad_enabled():
            x, report = checkpoint(block, x, view, layer, valid, router, use_reentrant=False, preserve_rng_state=False)
        else:
            x, report = block(x, view, layer, valid, router)
        if report is not None:
            reports.append(report)
    return x, summarise(reports)
