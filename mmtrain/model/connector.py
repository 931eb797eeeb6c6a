"""From patch features to decoder tokens: four connectors that end in the same two-layer MLP, dense or sparse.

Letters: N images, P = rows * columns patches, M = side * side tokens of an image, d_v vision width, c connector width,
d decoder width. A new connector is a class with this forward, one line in `build_connector`, one name in the schema.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mmtrain.config.schema import Model
from mmtrain.model.attention import Attention
from mmtrain.model.block import feed_forward
from mmtrain.model.mlp import Activation, linear
from mmtrain.model.moe import SparseMlp
from mmtrain.model.norm import LayerNorm
from mmtrain.model.parameter import embedding, parameter
from mmtrain.model.stepio import PartRouterInput, RouterStats, summarise
from mmtrain.mup.roles import Role

CONV_NORM_EPS = 1e-6
SQUEEZE_RATIO = 0.25


class Connector(nn.Module):
    """What all connectors share: subclasses say how patches become M tokens in `pool`."""

    def __init__(self, model: Model, d_in: int, activation: Activation) -> None:
        """d_in: width that `pool` returns."""
        super().__init__()
        moe, d_out = model.connector.moe, model.decoder.hidden_size
        self.mlp = feed_forward(moe, moe.num_experts > 0, d_in, d_out, d_out, activation, bias=True)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, d_v] -> [N, M, d_in]."""
        return features

    def forward(
        self, features: torch.Tensor, image_valid: torch.Tensor, routers: PartRouterInput | None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """features [N, P, d_v], image_valid [N] bool -> tokens [N, M, d], reports."""
        pooled = self.pool(features)
        if not isinstance(self.mlp, SparseMlp):
            return self.mlp(pooled), None
        routed = self.mlp(pooled, image_valid.unsqueeze(1).expand(pooled.shape[:2]), routers.layer(0))
        return routed.out, summarise([RouterStats(*routed[1:])])


class MlpConnector(Connector):
    """One token a patch through an MLP with GELU (LLaVA-1.5, arXiv:2310.03744)."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, model.vision.hidden_size, "gelu")


class AveragePool(Connector):
    """Averages over side x side cells of the grid, then the MLP."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, model.vision.hidden_size, "silu")
        self.grid = model.vision.grid()
        self.side = math.isqrt(model.connector.num_tokens)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, d_v] -> [N, M, d_v]."""
        return average_cells(features.unflatten(1, self.grid), self.side).flatten(1, 2)


class AttentionPool(Connector):
    """M learned queries attend to the patches."""

    def __init__(self, model: Model, attention_scale: float | None) -> None:
        width, d_vision = model.connector.hidden_size, model.vision.hidden_size
        heads = model.connector.num_heads
        super().__init__(model, width, "silu")
        eps = model.vision.norm_eps
        self.queries = embedding(model.connector.num_tokens, width)
        self.query_norm = LayerNorm(width, eps, bias=True)
        self.feature_norm = LayerNorm(d_vision, eps, bias=True)
        self.attention = Attention(width, heads, heads, width // heads, attention_scale, True, True, d_memory=d_vision)
        self.final_norm = LayerNorm(width, eps, bias=True)

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, d_v] -> [N, M, c]."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        read = self.attention(self.query_norm(queries), memory=self.feature_norm(features))
        return self.final_norm(queries + read)


class CAbstractor(Connector):
    """Honeybee's C-Abstractor (arXiv:2312.06742): RegNet stage, average pooling, RegNet stage, MLP."""

    def __init__(self, model: Model) -> None:
        connector, d_vision = model.connector, model.vision.hidden_size
        width = connector.hidden_size
        super().__init__(model, width, "silu")
        self.grid = model.vision.grid()
        self.side = math.isqrt(connector.num_tokens)
        self.positions = embedding(self.grid[0] * self.grid[1], d_vision)
        widths = [d_vision, *[width] * connector.depth]
        self.stage1 = nn.ModuleList(Bottleneck(widths[i], width) for i in range(connector.depth))
        self.stage2 = nn.ModuleList(Bottleneck(width, width) for _ in range(connector.depth))

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, d_v] -> [N, M, c]."""
        x = (features + self.positions).unflatten(1, self.grid)
        for block in self.stage1:
            x = block(x)
        x = average_cells(x, self.side)
        for block in self.stage2:
            x = block(x)
        return x.flatten(1, 2)


def average_cells(x: torch.Tensor, side: int) -> torch.Tensor:
    """[N, rows, columns, d] -> [N, side, side, d]: adaptive average pooling, cells differ by at most one patch."""
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)


class Depthwise(nn.Module):
    """3 x 3 convolution of each channel with itself, no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = parameter((width, 1, 3, 3), Role("input", 9, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, rows, columns, width] -> the same shape."""
        x = x.permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, padding=1, groups=x.shape[1]).permute(0, 2, 3, 1)


class Bottleneck(nn.Module):
    """RegNet block (arXiv:2003.13678) in timm's form: bottleneck ratio 1, depthwise 3x3, squeeze-excitation, SiLU.

    Channels last, so that 1x1 convolutions are linear layers and LayerNorm2d is LayerNorm.
    """

    def __init__(self, d_in: int, width: int) -> None:
        super().__init__()
        squeezed = round(d_in * SQUEEZE_RATIO)
        self.enter = linear(d_in, width, bias=False)
        self.norm1 = LayerNorm(width, CONV_NORM_EPS, bias=True)
        self.depthwise = Depthwise(width)
        self.norm2 = LayerNorm(width, CONV_NORM_EPS, bias=True)
        self.squeeze = linear(width, squeezed, bias=True)
        self.excite = linear(squeezed, width, bias=True)
        self.leave = linear(width, width, bias=False)
        self.norm3 = LayerNorm(width, CONV_NORM_EPS, bias=True)
        self.shortcut = linear(d_in, width, bias=False) if d_in != width else None
        self.shortcut_norm = LayerNorm(width, CONV_NORM_EPS, bias=True) if d_in != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, rows, columns, d_in] -> [N, rows, columns, width]."""
        shortcut = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        x = F.silu(self.norm1(self.enter(x)))
        x = F.silu(self.norm2(self.depthwise(x)))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((1, 2), keepdim=True)))))
        return F.silu(self.norm3(self.leave(x)) + shortcut)


def build_connector(model: Model, attention_scale: float | None = None) -> Connector:
    """The connector that `model` asks for, empty."""
    if model.connector.kind == "attention_pool":
        return AttentionPool(model, attention_scale)
    return {"c_abstractor": CAbstractor, "avg_pool": AveragePool, "mlp": MlpConnector}[model.connector.kind](model)
