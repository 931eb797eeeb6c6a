import math

import pytest

from mmtrain.config.schema import Optim
from mmtrain.optim.schedule import lr_factor

SHAPES = ("cosine", "linear", "constant")


def optim(schedule: str, warmup: int = 10, final: float = 0.1) -> Optim:
    return Optim(schedule=schedule, warmup_steps=warmup, final_lr_ratio=final)


@pytest.mark.parametrize("schedule", SHAPES)
def test_warm_up_is_a_line_from_zero_to_the_peak(schedule):
    assert [lr_factor(step, optim(schedule), 100) for step in range(1, 11)] == [step / 10 for step in range(1, 11)]


@pytest.mark.parametrize(
    ("schedule", "end", "half"), [("cosine", 0.1, 0.55), ("linear", 0.1, 0.55), ("constant", 1, 1)]
)
def test_the_ends_and_the_middle(schedule, end, half):
    assert lr_factor(110, optim(schedule), 110) == pytest.approx(end, abs=1e-12)
    assert lr_factor(60, optim(schedule), 110) == pytest.approx(half, abs=1e-12)
    assert lr_factor(1, optim(schedule, warmup=0), 110) <= 1.0


def test_a_quarter_of_the_way_tells_the_shapes_apart():
    quarter = 10 + 25
    assert lr_factor(quarter, optim("linear"), 110) == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_factor(quarter, optim("cosine"), 110) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("schedule", SHAPES)
def test_it_never_rises_after_the_peak_and_ends_where_it_should(schedule):
    factors = [lr_factor(step, optim(schedule), 50) for step in range(10, 51)]
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(1_000, optim(schedule), 50) == factors[-1]  # a step beyond the end stays at the end


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("total", [1, 9, 10])
def test_a_run_no_longer_than_its_warm_up_only_warms_up(schedule, total):
    assert [lr_factor(step, optim(schedule), total) for step in range(1, total + 1)] == [
        step / 10 for step in range(1, total + 1)
    ]


def test_steps_count_from_one():
    with pytest.raises(ValueError, match="steps count from 1, not 0"):
        lr_factor(0, optim("cosine"), 10)
