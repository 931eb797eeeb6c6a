"""Layers of one tensor rank. megatron-core's, with two changes: they return a tensor, and the reduction in front of a
column-parallel layer belongs to the block (one all-reduce for q, k and v instead of three)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmtrain.model.norm import RmsNorm
from mmtrain.parallel.collectives import enter, reduce, scatter
from mmtrain.parallel.libraries import ModelParallelConfig, tensor_parallel


def _config(tensor: int) -> ModelParallelConfig:
    """megatron-core's settings: no values (they are filled by name), no fused or overlapped communication."""
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
    )


def _no_values(_: torch.Tensor) -> None:
    """Initialiser that megatron-core asks for and never calls here."""


class Split:
    """Whether each rank holds a run of the positions between layers (mmtrain.parallel.sequence); by default, no."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.on = group, False


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """x [*, d_in] -> this rank's share of the outputs [*, d_out / tensor]. The caller applies `enter` to x."""

    def __init__(self, d_in: int, d_out: int, bias: bool, group: dist.ProcessGroup) -> None:
        super().__init__(
            d_in,
            d_out,
            config=_config(group.size()),
            init_method=_no_values,
            bias=bias,
            gather_output=False,
            disable_grad_reduce=True,
            tp_group=group,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, d_in] -> [*, d_out / tensor]."""
        return super().forward(x)[0]


class RowLinear(tensor_parallel.RowParallelLinear):
    """This rank's share of the inputs [*, d_in / tensor] -> [*, d_out], summed over the group; the bias added once.

    Where its neighbours share the positions, [B, T, d_in / tensor] -> [B, T / tensor, d_out].
    """

    def __init__(self, d_in: int, d_out: int, bias: bool, group: dist.ProcessGroup) -> None:
        super().__init__(
            d_in,
            d_out,
            config=_config(group.size()),
            init_method=_no_values,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        self.split = Split(group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, d_in / tensor] -> [*, d_out]."""
        if not self.split.on:
            return super().forward(x)[0]
        out = scatter(F.linear(x, self.weight), self.split.group)
        return out if self.bias is None else out + self.bias


class VocabularyEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Token ids -> embeddings, each rank holding a run of the (padded) vocabulary."""

    def __init__(self, padded_vocab: int, width: int, group: dist.ProcessGroup) -> None:
        super().__init__(padded_vocab, width, init_method=_no_values, config=_config(group.size()), tp_group=group)


class SharedGainNorm(RmsNorm):
    """RMSNorm of heads that are split over the group: each rank has a part of the gain's gradient; they are summed."""

    def __init__(self, norm: RmsNorm, group: dist.ProcessGroup) -> None:
        torch.nn.Module.__init__(self)
        self.weight, self.eps, self.group = norm.weight, norm.eps, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, head_dim] -> [*, head_dim]."""
        return F.rms_norm(x, self.weight.shape, enter(self.weight, self.group), self.eps)


class SplitNorm(RmsNorm):
    """RMSNorm over a width that is split over the group: the mean square is the group's, the gain this rank's part."""

    def __init__(self, weight: torch.nn.Parameter, eps: float, group: dist.ProcessGroup) -> None:
        torch.nn.Module.__init__(self)
        self.weight, self.eps, self.group = weight, eps, group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, width / tensor] -> [*, width / tensor]."""
        wide = x.float()
        # Every rank uses the sum, so its gradient is a sum over ranks as well: `enter` behind `reduce`.
        square = enter(reduce(wide.square().sum(-1, keepdim=True), self.group), self.group)
        scale = torch.rsqrt(square / (x.shape[-1] * self.group.size()) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight
