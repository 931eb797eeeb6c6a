"""Empty parameters with their muP roles; values come from muP's rules, a checkpoint or the upcycle map."""

import torch
from torch import nn

from mmtrain.mup.roles import Role, declare

EMBEDDING_STD = 0.02  # tokens, positions, class token, queries and the language head, as GPT-2, CLIP and Llama have it


def parameter(shape: tuple[int, ...], role: Role) -> nn.Parameter:
    """An empty parameter of `shape` with its muP role."""
    return declare(nn.Parameter(torch.empty(shape)), role)


def embedding(rows: int, width: int) -> nn.Parameter:
    """Learned vectors [rows, width] that enter the residual stream."""
    return parameter((rows, width), Role("input", None, width, std=EMBEDDING_STD))
