"""Roles of weights: what each one is to muP, declared on the line after its definition.

A role is data about the unsharded model. It holds logical fans (numbers of the model's own config), so a rule compares
the model with its base by name and never reads the shape of a live tensor, which sharding changes.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["input", "matrix", "vector", "head", "router"]


@dataclass(frozen=True)
class Role:
    """What a weight is, by Tensor Programs V (arXiv:2203.03466) with the rules of mmtrain/mup/rules.py.

    kind     input: finite -> wide (embeddings, patch conv, positions, depthwise conv); matrix: linear maps (a fixed
             fan-in or fan-out is found by comparing with the base); vector: gains and biases; head: wide -> logits;
             router: wide -> experts.
    fan_in   inputs of the map in the unsharded model; None where it has no meaning (vectors).
    fan_out  outputs of the map in the unsharded model.
    init     "normal" with std `std`; "zeros"; "ones".
    std      initial std at the base width; None means base_fan_in ** -0.5.
    rows     leading rows that mean something (the vocabulary without its padding); the rest starts at zero. None: all.
    """

    kind: Kind
    fan_in: int | None
    fan_out: int
    init: Literal["normal", "zeros", "ones"] = "normal"
    std: float | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Scales:
    """Factors that muP puts into the forward; at the base width and multipliers 1 they leave plain SP.

    attention_*  factor on q.k instead of 1/sqrt(head size): sqrt(base head size) / head size, times the multiplier.
    embedding    factor on token embeddings.
    output       factor on the language model's logits: 1 / m_in, times the multiplier.
    None for attention means 1/sqrt(head size).
    """

    attention_vision: float | None = None
    attention_connector: float | None = None
    attention_decoder: float | None = None
    embedding: float = 1.0
    output: float = 1.0


def declare(parameter: nn.Parameter, role: Role) -> nn.Parameter:
    """Attach `role` to `parameter` and return it. mup.registry reads it from the model on the meta device."""
    parameter.role = role
    return parameter
