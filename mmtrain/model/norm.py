"""The norms of the three parts: LayerNorm, RMSNorm (arXiv:1910.07467) and CRMSNorm (arXiv:2305.14858)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from mmtrain.model.parameter import parameter
from mmtrain.mup.roles import Role


def _gain(size: int) -> nn.Parameter:
    return parameter((size,), Role("vector", None, size, init="ones"))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = _gain(size)
        self.bias = parameter((size,), Role("vector", None, size, init="zeros")) if bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, size] -> [*, size]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _CpuRmsNorm(torch.autograd.Function):
    """RMSNorm in fp32 in few passes over memory: PyTorch has no fused kernel for CPUs (2.5 times as long)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, weight, scale)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        unit, weight, scale = ctx.saved_tensors
        product = (grad * unit).flatten(0, -2)
        mean = torch.mv(product, weight).view(scale.shape).div_(-unit.shape[-1])
        return torch.addcmul(grad * weight, unit, mean).mul_(scale), product.sum(0), None


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _gain(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, size] -> [*, size]."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return _CpuRmsNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CrmsNorm(nn.Module):
    """RMSNorm of the vector (x, -sum(x)), whose mean is zero, without its last entry.

    A pre-LayerNorm transformer of width n + 1 whose residual stream is mean-free can be stored in width n: the last
    entry follows from the others. Then x / sqrt((sum x^2 + (sum x)^2) / (n + 1) + eps) is its LayerNorm.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _gain(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[*, size] -> [*, size]."""
        wide = x.float()
        square = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        scale = torch.rsqrt(square / (x.shape[-1] + 1) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def decoder_norm(kind: Literal["rms", "layer", "crms"], size: int, eps: float) -> nn.Module:
    """The decoder's norm of that kind; none of them has a bias."""
    if kind == "layer":
        return LayerNorm(size, eps, bias=False)
    return RmsNorm(size, eps) if kind == "rms" else CrmsNorm(size, eps)
