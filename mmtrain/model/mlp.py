"""Dense feed-forward layer, its activations, and the linear layer that all parts of the model use.

Letters: d_in, d_out widths outside; hidden width inside.
"""

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from mmtrain.mup.roles import Kind, Role, declare

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "swiglu"]

QUICK_GELU_SLOPE = 1.702  # x * sigmoid(1.702 x), CLIP's GELU


def linear(d_in: int, d_out: int, bias: bool, kind: Kind = "matrix") -> nn.Linear:
    """A linear layer with declared roles and no values yet: mup.init or a checkpoint fills it."""
    device = torch.get_default_device()
    with torch.device("meta"):  # nn.Linear would draw from the global generator
        layer = nn.Linear(d_in, d_out, bias=bias)
    layer.to_empty(device=device)
    declare(layer.weight, Role(kind, d_in, d_out))
    if bias:
        declare(layer.bias, Role("vector", None, d_out, init="zeros"))
    return layer


def activate(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    """The non-linearity, element by element. For swiglu that is SiLU: its product with `up` is the caller's."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)
    return F.silu(x)


class Mlp(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) * up(x)) for swiglu (arXiv:2002.05202)."""

    def __init__(self, d_in: int, hidden: int, d_out: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation {activation!r} is none of {', '.join(get_args(Activation))}")
        self.activation: Activation = activation
        self.up = linear(d_in, hidden, bias)
        self.gate = linear(d_in, hidden, bias) if activation == "swiglu" else None
        self.down = linear(hidden, d_out, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]."""
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(activate(self.activation, self.up(x)))
