"""The learning-rate schedule: one factor for all groups, so that no schedule can erase muP's ratios between them."""

import math

from mmtrain.config.schema import Optim


def lr_factor(step: int, optim: Optim, total_steps: int) -> float:
    """The factor on every group's peak rate at optimizer step `step`, counted from 1, of a run of `total_steps`.

    Warm-up: step / warmup_steps, so that step warmup_steps runs at the peak. Then constant, or from 1 down to
    final_lr_ratio, reached at the last step: along half a cosine (SGDR, arXiv:1608.03983) or a line.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, not {step}")
    if step < optim.warmup_steps:
        return step / optim.warmup_steps
    if optim.schedule == "constant" or total_steps <= optim.warmup_steps:
        return 1.0
    progress = min(1.0, (step - optim.warmup_steps) / (total_steps - optim.warmup_steps))
    remaining = 1.0 - progress if optim.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * remaining
