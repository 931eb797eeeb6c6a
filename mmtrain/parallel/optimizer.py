"""The torch optimizer that DeepSpeed wraps: the one place where another one would be added.

Another one takes a name in config.schema.Optim.name, a branch here, its own rows in the table of mup.rules (which is
Adam's: another update rule moves weights by other powers of the width), and the tensors of its state among the kinds
of parallel.box, so that checkpoints carry them.
"""

from typing import Any

import torch

from mmtrain.config.schema import Optim

FUSED = ("cpu", "cuda")
"""Devices for which torch has AdamW as one pass over memory and without temporaries: the same rule."""


def make_optimizer(optim: Optim, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), fused where `device` has that, or SGD without momentum.

    groups  what optim.groups.param_groups made, with this rank's parameters; lr, weight decay and eps are each group's.
    """
    if optim.name == "adamw":
        betas = optim.beta1, optim.beta2
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=device.type in FUSED)
    return torch.optim.SGD(groups, lr=optim.lr)
