"""The statistics and verdicts of the coordinate check, against numpy's least squares and hand-made numbers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtrain.mup.coord import change, fit, judge, lacking, recording

WIDTHS = (32.0, 64.0, 128.0, 256.0)


def sizes(slope: float, noise: float = 0.0, seeds: int = 3) -> dict[float, list[float]]:
    """width^slope, another level for each seed, and noise."""
    rng = np.random.default_rng(0)
    return {
        width: [(1 + seed) * width**slope * 2 ** (noise * rng.standard_normal()) for seed in range(seeds)]
        for width in WIDTHS
    }


def test_a_fit_is_the_least_squares_line_with_a_level_for_each_seed():
    by_width = sizes(0.3, noise=0.2)
    y = np.log2([size for by_seed in by_width.values() for size in by_seed])
    x = np.repeat(np.log2(WIDTHS), 3)
    design = np.column_stack([x, *(np.tile(np.arange(3) == seed, 4) for seed in range(3))]).astype(float)
    coefficients, residuals, _, _ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(residuals[0] / (12 - 4) * np.linalg.inv(design.T @ design)[0, 0])
    line = fit(by_width)
    assert line.slope == pytest.approx(coefficients[0]) and line.error == pytest.approx(error) and line.count == 12


def test_exact_powers_have_their_slope_and_no_error():
    line = fit(sizes(-0.5))
    assert line.slope == pytest.approx(-0.5) and line.error == pytest.approx(0.0, abs=1e-9)
    assert line.r2 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "slope", "problem"),
    [
        ("block", 0.09, ""),
        ("block", 0.11, "grows: slope +0.11 + 2 x 0.00 is above +0.10"),
        ("block", -0.24, ""),
        ("block", -0.26, "shrinks: slope -0.26 - 2 x 0.00 is below -0.25"),
        ("attention logits", -0.5, ""),
        ("router logits", -0.59, ""),
        ("logits", -0.61, "shrinks: slope -0.61 - 2 x 0.00 is below -0.60"),
        ("router logits", 0.11, "grows: slope +0.11 + 2 x 0.00 is above +0.10"),
    ],
)
def test_a_slope_outside_the_limits_of_its_kind_is_a_problem(kind, slope, problem):
    (verdict,) = judge({f"{kind} vision.blocks.0": sizes(slope)})
    assert verdict.problem == problem and verdict.part == "vision" and verdict.kind == kind


def test_the_error_of_a_slope_counts_against_it():
    (verdict,) = judge({"block decoder.blocks.1": sizes(0.0, noise=1.0)})
    assert verdict.fit.slope < 0.10 and verdict.problem.startswith(("grows", "shrinks"))


@pytest.mark.parametrize(
    ("kind", "slope", "noise", "problem", "outside"),
    [
        ("block", 0.3, 0.1, "grows", True),
        ("block", 0.3, 1.5, "grows", False),
        ("block", -0.5, 0.1, "shrinks", True),
        ("logits", -0.5, 0.1, "", False),
        ("block", 0.0, 0.1, "", False),
    ],
)
def test_outside_is_what_no_noise_explains(kind, slope, noise, problem, outside):
    (verdict,) = judge({f"{kind} decoder.blocks.1": sizes(slope, noise)})
    assert verdict.problem.startswith(problem) and bool(verdict.problem) == bool(problem)
    assert verdict.outside == outside


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_what_does_not_change_or_diverges_is_a_problem(bad):
    by_width = sizes(0.0)
    by_width[64.0][1] = bad
    (verdict,) = judge({"block decoder.blocks.1": by_width})
    assert verdict.problem == f"changed by {bad:g} at width 64: nothing learns there, or training diverged"
    assert verdict.outside


@pytest.mark.parametrize(
    ("widths", "seeds", "steps", "parameters", "found"),
    [
        ([1, 2, 4, 8], 3, 8, [1, 2, 3, 4], None),
        ([1, 2, 8], 3, 8, [1, 2, 3], "at least 4 of them over a factor of 8"),
        ([1, 2, 3, 4], 3, 8, [1, 2, 3, 4], "at least 4 of them over a factor of 8"),
        ([1, 2, 4, 8], 2, 8, [1, 2, 3, 4], "2 seeds: at least 3"),
        ([1, 2, 4, 8], 3, 7, [1, 2, 3, 4], "7 steps: at least 8"),
        ([1, 2, 4, 8], 3, 8, [1, 2, 2, 4], "some widths give the same model"),
    ],
)
def test_a_check_that_proves_nothing_is_told(widths, seeds, steps, parameters, found):
    problems = lacking(widths, seeds, steps, parameters)
    assert problems == [] if found is None else len(problems) == 1 and found in problems[0]


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.3, enable_gqa=True)


class Toy(nn.Module):
    """Two modules with names of the real model."""

    def __init__(self) -> None:
        super().__init__()
        self.connector = nn.Module()
        self.connector.attention = Attention()
        self.connector.router = nn.Linear(2, 2)


def test_recording_keeps_outputs_by_name_and_attention_logits_as_they_are_made():
    toy, q, k = Toy(), torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2)
    mask = torch.zeros(1, 1, 3, 3).masked_fill_(torch.ones(3, 3).triu(1).bool(), -math.inf)
    real = F.scaled_dot_product_attention
    with recording(toy) as seen:
        out = toy.connector.attention(q, k, mask)
        logit = toy.connector.router(torch.ones(2))
    assert F.scaled_dot_product_attention is real
    assert out.equal(toy.connector.attention(q, k, mask))
    assert seen.scales == {"connector.attention": 0.3}
    assert seen.activations["router logits connector.router"].equal(logit.detach())
    by_hand = torch.stack([0.3 * q[0, head] @ k[0, head // 2].t() for head in range(4)])
    expected = by_hand[torch.ones(3, 3).tril().bool().expand(4, 3, 3)]
    torch.testing.assert_close(seen.activations["attention logits connector.attention"], expected)


def test_change_is_the_rms_of_the_difference():
    before, after = {"a": torch.zeros(4)}, {"a": torch.tensor([3.0, 0.0, 0.0, 4.0])}
    assert change(before, after) == {"a": pytest.approx(2.5)}
