"""A study shared by workers: claims, resumption, repetitions, the median rule. No training here."""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.sweep.spec import VARIANT, Choices, Prune, Range, Repeat, Sweep
from mmtrain.sweep.study import Study, importance, median_rule
from mmtrain.sweep.summary import best, curves, write_report
from mmtrain.sweep.trial import Outcome


def sweep(out: Path, **changes) -> Sweep:
    """A grid of three rates."""
    whole = Sweep(
        file=out / "sweep.yaml",
        name="s",
        recipe=out / "recipe.yaml",
        out=out / "run",
        search={"optim.lr": Choices((0.1, 0.2, 0.4))},
        sampler="grid",
    )
    return replace(whole, **changes)


def outcome(loss: float, ending: str = "done") -> tuple[Outcome, dict]:
    curve = [(1, 3.0), (2, loss)]
    facts = {"ending": ending, "curve": curve, "seed": 0, "steps": 2, "width": 8, "parameters": 5, "active": 5}
    return Outcome(ending, loss, 2, curve), {**facts, "tokens": 10.0, "flops": 1e3}


def finish_all(study: Study, loss=lambda params: params["optim.lr"]) -> int:
    """Claim and finish until nothing is left; how many there were."""
    count = 0
    while (claim := study.claim()) is not None:
        value = loss(claim.params)
        study.finish(claim, *outcome(value, "done" if math.isfinite(value) else "diverged"))
        count += 1
    return count


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_a_grid_is_done_once_and_stays_done(tmp_path, storage):
    study = Study(sweep(tmp_path, storage=storage))
    assert finish_all(study) == 3
    again = Study(sweep(tmp_path, storage=storage))
    assert again.claim() is None
    trials = again.trials()
    assert [(trial.state, trial.params["optim.lr"], trial.loss) for trial in trials] == [
        ("done", 0.1, 0.1),
        ("done", 0.2, 0.2),
        ("done", 0.4, 0.4),
    ]


def test_a_diverged_trial_is_a_result(tmp_path):
    study = Study(sweep(tmp_path))
    finish_all(study, lambda params: math.inf if params["optim.lr"] > 0.3 else params["optim.lr"])
    assert [trial.state for trial in study.trials()] == ["done", "done", "diverged"]
    assert [trial.number for trial in best(study.trials())] == [0, 1]
    assert curves(study.trials(), "optim.lr")[""][0.4] == (math.inf, math.inf, math.inf)


def test_an_interrupted_trial_goes_on_under_its_number_before_new_ones(tmp_path):
    study = Study(sweep(tmp_path))
    claim = study.claim()
    study.finish(claim, replace(outcome(1.0)[0], ending="interrupted", code=75), {})
    assert study.trials()[0].state == "running"
    again = Study(sweep(tmp_path)).claim()
    assert (again.number, again.params) == (claim.number, claim.params)


@contextmanager
def held_elsewhere(out: Path, number: int) -> Iterator[None]:
    """Another process holds the claim on a trial."""
    path = out / "run" / "claims" / f"{number:04d}" / ".lock"
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held'); input()"
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    try:
        yield
    finally:
        other.communicate("\n")


def test_what_a_living_worker_holds_nobody_else_gets(tmp_path):
    study = Study(sweep(tmp_path))
    first = study.claim()
    first.lock.release()
    with held_elsewhere(tmp_path, first.number):
        second = Study(sweep(tmp_path)).claim()
        assert second.number == first.number + 1
        second.lock.release()
    assert Study(sweep(tmp_path)).claim().number == first.number


def test_an_error_counts_a_trial_out(tmp_path):
    study = Study(sweep(tmp_path))
    study.let_go(study.claim())
    assert [trial.number for trial in study.trials()] == [1, 2]


def test_a_pruned_trial_has_no_loss(tmp_path):
    study = Study(sweep(tmp_path))
    study.finish(study.claim(), *outcome(2.0, "pruned"))
    trial = study.trials()[0]
    assert trial.state == "pruned" and math.isnan(trial.loss) and best([trial]) == []


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_samplers_stay_in_their_ranges_and_stop_at_their_number(tmp_path, sampler):
    space = {"optim.lr": Range(1e-3, 1e-1), "mup.init": Range(0.5, 2.0)}
    study = Study(sweep(tmp_path, sampler=sampler, trials=6, search=space, variants={"a": (), "b": ()}))
    assert finish_all(study) == 6
    for trial in study.trials():
        assert 1e-3 <= trial.params["optim.lr"] <= 1e-1 and 0.5 <= trial.params["mup.init"] <= 2.0
        assert trial.params[VARIANT] in ("a", "b")


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_points_follow_from_the_seed_and_not_from_who_asks(tmp_path, sampler):
    space = {"optim.lr": Range(1e-3, 1e-1), "mup.init": Range(0.5, 2.0)}

    def points(name: str, seed: int, workers: int) -> list[dict]:
        chosen = sweep(tmp_path / name, sampler=sampler, trials=14, search=space, seed=seed)  # TPE learns from the 10th
        studies = [Study(chosen) for _ in range(workers)]
        for turn in range(14):
            study = studies[turn % workers]
            claim = study.claim()
            study.finish(claim, *outcome(claim.params["optim.lr"]))
        return [trial.params for trial in studies[0].trials()]

    alone = points("alone", 0, 1)
    assert points("shared", 0, 3) == alone
    assert points("other", 1, 1) != alone
    assert len({point["optim.lr"] for point in alone}) == 14


def test_the_best_points_of_each_variant_are_repeated_with_other_seeds(tmp_path):
    study = Study(sweep(tmp_path, variants={"a": (), "b": ()}, repeat=Repeat(best=1, seeds=(7, 8))))
    claims = []
    while (claim := study.claim()) is not None:
        claims.append((claim.params["optim.lr"], claim.params[VARIANT], claim.seed))
        study.finish(claim, *outcome(claim.params["optim.lr"] * (1 if claim.params[VARIANT] == "a" else -1)))
    assert len(claims) == 6 + 4
    assert claims[6:] == [(0.1, "a", 7), (0.4, "b", 7), (0.1, "a", 8), (0.4, "b", 8)]


def test_repetitions_wait_for_trials_of_others(tmp_path):
    study = Study(sweep(tmp_path, repeat=Repeat(best=1, seeds=(7,)), search={"optim.lr": Choices((0.1,))}))
    claim = study.claim()
    claim.lock.release()
    with held_elsewhere(tmp_path, claim.number):
        assert study.claim() == "wait"
    study.finish(study.claim(), *outcome(1.0))
    assert study.claim().seed == 7


def test_another_sweep_in_the_same_folder_is_refused(tmp_path):
    Study(sweep(tmp_path))
    with pytest.raises(ConfigError, match=r"holds the study of another sweep: search, set differ; choose another out"):
        Study(sweep(tmp_path, set=("steps=3",), search={"optim.lr": Choices((0.1, 0.3))}))
    Study(sweep(tmp_path, prune=Prune(), repeat=Repeat(1, (2,))))


def test_a_look_at_no_study_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no study yet; start it with python launch/sweep\.py"):
        Study(sweep(tmp_path), create=False)


OTHERS = [[(10, 3.0), (50, 1.0)], [(10, 2.0), (50, 1.5)], [(10, 4.0), (50, 3.0)]]


@pytest.mark.parametrize(
    ("curve", "others", "ends"),
    [
        ([(10, 9.0), (50, 1.6)], OTHERS, True),  # above the median 1.5
        ([(10, 9.0), (50, 1.4)], OTHERS, False),
        ([(10, 1.4), (50, 9.0)], OTHERS, False),  # its best so far counts
        ([(10, 9.0)], OTHERS, False),  # in the warm-up
        ([(100, 9.0)], OTHERS, False),  # at its end
        ([(50, 9.0)], OTHERS[:2], False),  # too few others
        ([(50, 9.0)], [*OTHERS, [(60, 0.1)]], True),  # one that has said nothing yet counts as bad
        ([(50, math.inf)], OTHERS, True),
        ([], OTHERS, False),
    ],
)
def test_the_median_rule(curve, others, ends):
    assert median_rule(Prune(startup=3, warmup=0.3), curve, 100, lambda: others) is ends


def test_the_rule_compares_trials_of_one_variant(tmp_path):
    study = Study(sweep(tmp_path, variants={"a": (), "b": ()}, prune=Prune(startup=1, warmup=0.0)))
    study.finish(study.claim(), *outcome(1.0))
    other = study.claim()
    assert study.trials()[0].params[VARIANT] == "a" and other.params[VARIANT] == "b"
    bad = [(2, 5.0)]
    assert not study.judge(other, 10)(bad)
    assert study.judge(replace(other, params={**other.params, VARIANT: "a"}), 10)(bad)


def test_the_report_is_a_csv_and_plots(tmp_path):
    space = {"optim.lr": Choices((0.1, 0.2, 0.4)), "mup.init": Choices((0.5, 1.0, 2.0))}
    chosen = sweep(tmp_path, search=space)
    study = Study(chosen)
    finish_all(study, lambda params: abs(math.log(params["optim.lr"] / 0.2)) + 0.01 * params["mup.init"])
    csv, *plots = write_report(chosen, study.trials())
    lines = csv.read_text().splitlines()
    assert lines[0] == "trial,state,loss,optim.lr,mup.init,width,parameters,active,steps,tokens,flops,seed"
    assert len(lines) == 10
    assert [plot.name for plot in plots] == ["loss_over_lr.png", "parallel.png", "importance.png"]
    shares = importance(chosen, study.trials())
    assert shares["optim.lr"] > 0.8 and sum(shares.values()) == pytest.approx(1.0)
