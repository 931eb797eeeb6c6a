"""Image encoder: a pre-norm ViT in CLIP's layout (arXiv:2103.00020), cut after the layer whose output is wanted.

Letters: N images, P patches, L = P + class token, d width, p patch side.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from mmtrain.config.schema import Vision
from mmtrain.model.attention import EVERYTHING, Attention
from mmtrain.model.block import Block, feed_forward, run_blocks
from mmtrain.model.norm import LayerNorm
from mmtrain.model.parameter import embedding, parameter
from mmtrain.model.stepio import PartRouterInput, RouterStats
from mmtrain.mup.roles import Role

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of pixels in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
PIXELS = {"clip": (PIXEL_MEAN, PIXEL_STD), "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


def interpolate_positions(
    old: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], class_token: bool
) -> torch.Tensor:
    """Positions [c + P_old, d] of one grid (height, width) -> [c + P_new, d] of another: bicubic in fp32.

    The class token's position (row 0, where there is one) is kept. The result is fp32.
    """
    old = old.float()
    if old_grid == new_grid:
        return old
    kept = int(class_token)
    grid = old[kept:].unflatten(0, old_grid).permute(2, 0, 1).unsqueeze(0)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((old[:kept], grid.squeeze(0).permute(1, 2, 0).flatten(0, 1)))


class PatchEmbedding(nn.Module):
    """Convolution whose stride is its kernel: each patch times one matrix."""

    def __init__(self, patch_size: int, d_model: int, bias: bool, pixel_norm: Literal["clip", "half"] = "clip") -> None:
        super().__init__()
        self.pixel_mean, self.pixel_std = PIXELS[pixel_norm]
        shape = (d_model, 3, patch_size, patch_size)
        self.weight = parameter(shape, Role("input", 3 * patch_size**2, d_model))
        self.bias = parameter((d_model,), Role("vector", None, d_model, init="zeros")) if bias else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] uint8, or float that is normalised already -> [N, P, d], patches row by row."""
        side = self.weight.shape[-1]
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [N, P, 3, p, p]
        if images.dtype == torch.uint8:
            std = torch.tensor(self.pixel_std, device=images.device).view(3, 1, 1)
            mean = torch.tensor(self.pixel_mean, device=images.device).view(3, 1, 1)
            patches = torch.addcmul(-mean / std, patches.float(), 1 / (255 * std))
        return F.linear(patches.flatten(2).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class VisionEncoder(nn.Module):
    """Images to the features of their patches."""

    def __init__(self, vision: Vision, attention_scale: float | None, recompute: bool) -> None:
        super().__init__()
        d_model = vision.hidden_size
        head_dim = d_model // vision.num_heads
        rows, columns = vision.grid()
        self.patch = PatchEmbedding(vision.patch_size, d_model, vision.patch_bias, vision.pixel_norm)
        self.class_token = embedding(1, d_model) if vision.class_token else None
        self.positions = embedding(rows * columns + int(vision.class_token), d_model)
        self.pre_norm = LayerNorm(d_model, vision.norm_eps, bias=True) if vision.pre_norm else None
        self.blocks = nn.ModuleList(
            Block(
                LayerNorm(d_model, vision.norm_eps, bias=True),
                Attention(d_model, vision.num_heads, vision.num_heads, head_dim, attention_scale, True, True),
                LayerNorm(d_model, vision.norm_eps, bias=True),
                feed_forward(
                    vision.moe,
                    vision.moe.is_sparse(layer),
                    d_model,
                    vision.intermediate_size,
                    d_model,
                    vision.activation,
                    bias=True,
                ),
            )
            for layer in range(vision.built_layers())
        )
        self.final_norm = LayerNorm(d_model, vision.norm_eps, bias=True) if vision.final_norm else None
        self.recompute = recompute

    def forward(
        self, images: torch.Tensor, image_valid: torch.Tensor, routers: PartRouterInput | None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """images [N, 3, H, W] uint8 (or normalised float), image_valid [N] bool -> features [N, P, d], reports."""
        x = self.patch(images)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), 1)
        x = x + self.positions
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        valid = image_valid.unsqueeze(1).expand(x.shape[:2])
        x, reports = run_blocks(self.blocks, x, EVERYTHING, valid, routers, self.recompute)
        if self.class_token is not None:
            x = x[:, 1:]
        return x if self.final_norm is None else self.final_norm(x), reports
