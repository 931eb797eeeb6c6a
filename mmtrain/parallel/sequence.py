"""Sequence parallelism (arXiv:2205.05198, section 4.2.2): tensor ranks share the decoder's positions where they share
no matrix. Each holds its own run of T / t positions of the residual stream and of the norms in it:

    embeddings [B, T, d] on every rank -> its own run [B, T / t, d]
    attention, dense MLP                  gathered in front, summed and scattered behind: no more traffic than without
    sparse MLP                            gathered in front, its own run taken behind; routing is the same on every rank
    final norm                            gathered behind: the head and the loss see all positions

A norm's gain and the bias of a row-parallel layer get the gradient of this rank's positions alone: `split_sequence`
names them, and the engine sums them over the tensor group once a step. Images are encoded whole on every rank.

megatron-core's own path is for CUDA only (version 0.16.1), so the four autograd functions are in `collectives`.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmtrain.model.decoder import Decoder
from mmtrain.model.mlp import Mlp
from mmtrain.model.moe import Routed, SparseMlp
from mmtrain.parallel.collectives import gather, own_run
from mmtrain.parallel.layers import Split
from mmtrain.parallel.tensor import parameters


def split_sequence(model: nn.Module, group: dist.ProcessGroup) -> set[str]:
    """Make the decoder of a model that `shard` has cut share its positions over the tensor group.

    Returns the names of the parameters whose gradients are from then on those of this rank's positions.
    """
    decoder: Decoder = model.decoder
    split = Split(group)
    for block in decoder.blocks:
        block.attention.split = block.attention.out.split = split
        if isinstance(block.mlp, Mlp):
            block.mlp.split = block.mlp.down.split = split
        else:
            block.mlp.register_forward_pre_hook(partial(_gather_tokens, split))
            block.mlp.register_forward_hook(partial(_keep_own_tokens, split))
    decoder.register_forward_pre_hook(partial(_begin, split))
    decoder.register_forward_hook(partial(_end, split))
    on_runs = [norm for block in decoder.blocks for norm in (block.norm1, block.norm2)] + [decoder.norm]
    own = {id(parameter) for module in on_runs for parameter in module.parameters()}
    for block in decoder.blocks:
        rows = [block.attention.out] + ([block.mlp.down] if isinstance(block.mlp, Mlp) else [])
        own |= {id(row.bias) for row in rows if row.bias is not None}
    return {name for name, parameter in parameters(model) if id(parameter) in own}


def _begin(split: Split, _: Decoder, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """In front of the decoder: [B, T, d] -> this rank's positions.

    Text that is being generated comes position by position and stays whole; so does a text for evaluation whose length
    the ranks cannot share. With gradients that would sum wrong ones: ValueError.
    """
    embeddings, cache = args[0], args[4] if len(args) > 4 else None
    length, ranks = embeddings.shape[1], split.group.size()
    split.on = cache is None and length % ranks == 0
    if torch.is_grad_enabled() and not split.on:
        raise ValueError(f"{ranks} tensor ranks cannot share {length} positions: the recipe's check was not run")
    return (own_run(embeddings, split.group), *args[1:]) if split.on else args


def _end(split: Split, _: Decoder, __: tuple[Any, ...], result: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    """Behind the final norm: this rank's positions -> [B, T, d]."""
    hidden, reports = result
    return (gather(hidden, split.group) if split.on else hidden), reports


def _gather_tokens(split: Split, _: SparseMlp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (gather(args[0], split.group), *args[1:]) if split.on else args


def _keep_own_tokens(split: Split, _: SparseMlp, __: tuple[Any, ...], routed: Routed) -> Routed:
    return routed._replace(out=own_run(routed.out, split.group)) if split.on else routed
