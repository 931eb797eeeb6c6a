"""The lr figure from a study's trials, made by hand: where optima are, how far they move, what is written."""

import csv
import json
import math

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.sweep.spec import VARIANT
from mmtrain.sweep.study import Trial
from tools.lr_figure import check_searched, curves, optimum, plot, shift, summary, wider_is_better, write_csv

RATES = (0.001, 0.002, 0.004, 0.008)


def trial(number: int, variant: str, lr: float, loss: float, seed: int = 0) -> Trial:
    width = int(variant.rpartition("_")[2])
    facts = {"width": width, "parameters": width**2, "active": width, "steps": 3, "tokens": 9.0, "flops": 1e3}
    state = "done" if math.isfinite(loss) else "diverged"
    return Trial(number, state, {VARIANT: variant, "optim.lr": lr}, loss, {**facts, "seed": seed})


def bowl(variant: str, best: float, floor: float) -> list[Trial]:
    """Two seeds a rate, a parabola in log2 of the rate."""
    return [
        trial(seed, variant, lr, floor + math.log2(lr / best) ** 2 + 0.01 * seed, seed)
        for lr in RATES
        for seed in (0, 1)
    ]


TRIALS = [
    *bowl("base_32", 0.004, 1.0),
    *bowl("mup_64", 0.004, 0.9),
    *bowl("mup_128", 0.002, 0.8),
    *bowl("sp_128", 0.001, 0.95),
    Trial(99, "running", {VARIANT: "sp_128", "optim.lr": 0.016}, math.nan),
]


def test_the_base_belongs_to_each_parametrisation_and_widths_rise():
    found = curves(TRIALS[::-1])
    assert {name: list(widths) for name, widths in found.items()} == {"mup": [32, 64, 128], "sp": [32, 128]}
    assert list(found["mup"][64]) == list(RATES) and found["mup"][32] == found["sp"][32]
    assert sorted(found["mup"][64][0.004]) == [0.9, 0.91]


def test_optima_and_their_shift():
    said = summary(curves(TRIALS))
    assert [at["lr"] for at in said["mup"]["best"].values()] == [0.004, 0.004, 0.002]
    assert all(at["interior"] for at in said["mup"]["best"].values())
    assert said["mup"]["shift_in_factors_of_2"] == -1 and said["sp"]["shift_in_factors_of_2"] == -2
    assert said["sp"]["best"][128]["interior"] is False
    assert said["sp"]["loss_at_the_narrowest_best_lr"][128] == pytest.approx(0.95 + 4 + 0.005)


def test_a_rate_with_fewer_seeds_or_a_divergence_is_no_optimum():
    assert optimum({0.1: [3.0, 3.0], 0.2: [2.0, 2.0], 0.4: [1.0]}).lr == 0.2
    at = optimum({0.1: [3.0, 3.0], 0.2: [2.0, 2.0], 0.4: [1.0, math.inf]})
    assert at.lr == 0.2 and at.interior
    assert shift({8: at, 4: optimum({0.1: [1.0], 0.2: [2.0]})}) == 1


def test_wider_is_better_where_every_step_up_lowers_the_loss():
    widths = {32: {0.1: [2.0], 0.2: [2.0], 0.4: [1.0]}, 64: {0.1: [1.0], 0.2: [1.0]}, 128: {0.1: [0.5], 0.2: [1.5]}}
    assert wider_is_better(widths) == {0.1: True, 0.2: False}


def test_names_that_say_no_width_are_refused():
    with pytest.raises(ConfigError, match=r"variant wide of the sweep is not named PARAMETRISATION_WIDTH"):
        curves([Trial(0, "done", {VARIANT: "wide", "optim.lr": 0.1}, 1.0)])
    with pytest.raises(ConfigError, match=r"only base so far"):
        curves(bowl("base_32", 0.004, 1.0))


def test_a_search_that_the_figure_does_not_show_is_refused():
    check_searched(["optim.lr"])
    check_searched(["seed", "optim.lr"])
    with pytest.raises(ConfigError, match=r"the sweep searches mup\.init, and it has no optim\.lr"):
        check_searched(["mup.init"])
    with pytest.raises(ConfigError, match=r"searches optim\.lr, seed, mup\.init, and mup\.init would pass for seeds"):
        check_searched(["optim.lr", "seed", "mup.init"])


def test_files_hold_every_trial_that_ended(tmp_path):
    trials = [*TRIALS, trial(7, "mup_64", 0.016, math.inf)]
    rows = list(csv.DictReader(write_csv(trials, tmp_path / "f.csv").read_text().splitlines()))
    assert len(rows) == 33 and rows[-1]["state"] == "diverged" and rows[-1]["loss"] == "inf"
    assert rows[0]["variant"] == "base_32" and rows[0]["parameters"] == "1024"
    assert plot(curves(trials), tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(summary(curves(trials))))["mup"]["best"]["32"]["lr"] == 0.004
