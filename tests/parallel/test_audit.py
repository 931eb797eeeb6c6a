"""The audit of the first step finds what it is for; that layouts pass it is in test_layouts.py."""

import math

import pytest
import torch

from mmtrain.config.schema import Parallel
from mmtrain.optim.groups import hyperparameters
from tests.parallel import audit, harness
from tests.parallel.harness import State

FACTOR = 0.5
NAME = "decoder.blocks.0.attention.q.weight"


def one_step(recipe, multiplier: float = 1.0, decay: float = 1.0) -> tuple[State, State]:
    """The state before and after AdamW's first step on random gradients; NAME with wrong factors."""
    before, after = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, entry in harness.parts_of(recipe)[1].entries.items():
        lr, wd, _ = hyperparameters(name, entry, recipe.optim)
        if name == NAME:
            lr, wd = lr * multiplier, wd * decay
        start, gradient = torch.ones(entry.shape) * 0.5, torch.randn(entry.shape, generator=generator)
        before["param", name] = start
        after["param", name] = start - lr * FACTOR * (gradient.sign() + wd * start)
        after["exp_avg", name] = 0.1 * gradient
    return before, after


def ratios(multiplier: float = 1.0, decay: float = 1.0) -> dict[str, float]:
    recipe = audit.recipe(Parallel())
    return {row.name: row.ratio for row in audit.rows(recipe, FACTOR, *one_step(recipe, multiplier, decay))}


def test_a_right_step_moves_every_entry_by_its_rate():
    assert all(abs(ratio - 1) < audit.TOLERANCE for ratio in ratios().values())


@pytest.mark.parametrize(("multiplier", "decay"), [(2.0, 1.0), (0.5, 1.0), (1.0, 0.0)])
def test_a_wrong_rate_or_decay_shows_at_its_tensor_alone(multiplier, decay):
    found = ratios(multiplier, decay)
    assert [name for name, ratio in found.items() if abs(ratio - 1) > audit.TOLERANCE] == [NAME]


def test_a_tensor_without_gradient_is_listed_with_the_reason():
    recipe = audit.recipe(Parallel())
    before, after = one_step(recipe)
    after["exp_avg", NAME].zero_()
    row = next(row for row in audit.rows(recipe, FACTOR, before, after) if row.name == NAME)
    assert math.isnan(row.ratio) and row.entries == 0 and row.reason == "its gradient is zero"
