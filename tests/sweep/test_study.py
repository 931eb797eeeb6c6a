"""A study shared by workers: claims, resumption, repetitions, the median rule. No training here."""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch.sweep
from mmtrain.config.errors import ConfigError
from mmtrain.sweep.identity import identity
from mmtrain.sweep.spec import VARIANT, Choices, Parent, Prune, Range, Repeat, Sweep
from mmtrain.sweep.study import Study, Trial, importance, median_rule, to_come
from mmtrain.sweep.summary import best, curves, write_report
from mmtrain.sweep.trial import Outcome

RECIPE = "{name: small, out: nowhere, steps: 10, data: {tokenizer: nowhere.json}, optim: {lr: 0.3}, seed: 0}"


def sweep(out: Path, **changes) -> Sweep:
    """A grid of three rates."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(RECIPE)
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
def held_elsewhere(out: Path, number: int | None = None) -> Iterator[None]:
    """Another process holds the claim on a trial; None: it has its turn to decide."""
    claims = out / "run" / "claims"
    path = (claims if number is None else claims / f"{number:04d}") / ".lock"
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
    assert [trial.state for trial in study.trials()] == ["failed", "waiting", "waiting"]


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


def test_more_trials_and_more_seeds_have_their_repetitions(tmp_path):
    space = {"optim.lr": Range(1e-3, 1e-1)}
    one = sweep(tmp_path, sampler="random", trials=2, search=space, repeat=Repeat(best=1, seeds=(7,)))
    losses = iter((2.0, 3.0, 2.5, 1.0, 4.0, 1.5, 1.6, 1.7))

    def tried(changed: Sweep) -> list[int | None]:
        study, known = Study(changed), len(Study(changed).trials())
        assert to_come(changed, study.trials()) > 0
        finish_all(study, lambda params: next(losses))
        assert to_come(changed, study.trials()) == 0
        return [trial.seed for trial in study.trials()[known:]]

    assert tried(one) == [None, None, 7]
    assert tried(replace(one, trials=4)) == [None, None, 7]  # trial 3 is the best now
    assert tried(replace(one, trials=4, repeat=Repeat(best=1, seeds=(7, 8)))) == [8]
    trials = Study(replace(one, trials=4, repeat=Repeat(best=1, seeds=(7, 8)))).trials()
    assert trials[2].params == trials[0].params and trials[5].params == trials[6].params == trials[3].params


def test_a_repetition_that_an_error_ended_is_not_put_in_line_again(tmp_path):
    study = Study(sweep(tmp_path, repeat=Repeat(best=1, seeds=(7,)), search={"optim.lr": Choices((0.1,))}))
    study.finish(study.claim(), *outcome(1.0))
    study.let_go(study.claim())
    assert study.claim() is None


def test_what_is_to_come_is_counted(tmp_path):
    space = {"optim.lr": Range(1e-3, 1e-1)}
    one = sweep(tmp_path, sampler="tpe", trials=3, search=space, repeat=Repeat(best=1, seeds=(7,)))
    study = Study(one)
    assert to_come(one, study.trials()) == 3
    study.let_go(study.claim())
    claim = study.claim()
    assert to_come(one, study.trials()) == 2
    study.finish(claim, *outcome(1.0))
    assert to_come(one, study.trials()) == 2 + 1
    grid = sweep(tmp_path / "grid")
    assert to_come(grid, Study(grid).trials()) == 3


def test_the_table_is_watched_until_nothing_is_to_come(tmp_path, monkeypatch):
    one = sweep(tmp_path, sampler="tpe", trials=2)
    facts = {"seed": 0, "steps": 2}
    first, second = (Trial(number, "done", {"optim.lr": 0.1, VARIANT: ""}, 1.0, facts) for number in (0, 1))
    looks = iter([[], [replace(first, state="running")], [first], [first, second]])
    monkeypatch.setattr("launch.sweep.LOOK_SECONDS", 0.0)
    assert launch.sweep.watch(SimpleNamespace(sweep=one, trials=lambda: next(looks))) == 0
    assert next(looks, None) is None


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
    told = r"holds the study of another sweep: set, search, recipe's steps differ; choose another out"
    with pytest.raises(ConfigError, match=told):
        Study(sweep(tmp_path, set=("steps=3",), search={"optim.lr": Choices((0.1, 0.3))}))
    Study(sweep(tmp_path, prune=Prune(), repeat=Repeat(1, (2,))))


@pytest.mark.parametrize("create", [True, False])
def test_an_edited_recipe_is_another_sweep_whoever_looks(tmp_path, create):
    one = sweep(tmp_path, parent=Parent(tmp_path / "recipe.yaml"))
    Study(one)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("lr: 0.3", "lr: 0.4").replace("steps: 10", "steps: 11"))
    # the rate is searched: only the parent learns with the recipe's own
    with pytest.raises(ConfigError, match=r"sweep: recipe's steps, parent's steps, parent's optim.lr differ;"):
        Study(one, create=create)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError, match=r"holds the study of another sweep: name differ"):
        Study(replace(one, name="t"), create=create)


def test_what_no_result_follows_from_may_change(tmp_path):
    Study(sweep(tmp_path))
    again = sweep(tmp_path, recipe=tmp_path / "recipe.yaml" / ".." / "recipe.yaml", prune=Prune())
    (tmp_path / "recipe.yaml").write_text(
        RECIPE[:-1] + ", log: {every: 3}, parallel: {zero_stage: 1}, guard: {max_skips: 3}}"
    )
    Study(again, create=False)


def test_a_study_of_names_of_files_is_compared_by_the_rest(tmp_path):
    one = sweep(tmp_path)
    study = Study(one)
    mine = identity(one)
    del mine["recipes"]
    study._study.set_user_attr("sweep", {**mine, "recipe": "configs/recipe.yaml", "parent": None})
    assert finish_all(Study(one)) == 3
    with pytest.raises(ConfigError, match=r"another sweep: seed differ"):
        Study(replace(one, seed=1), create=False)


def test_a_worker_killed_while_it_puts_a_grid_in_line_leaves_no_point_twice(tmp_path, monkeypatch):
    one = sweep(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("mmtrain.sweep.study.identity", raises(KeyboardInterrupt))
        Study(one)
    with pytest.raises(ConfigError, match="no study yet"):
        Study(one, create=False)
    assert finish_all(Study(one)) == 3


def raises(error: type[BaseException]):
    def function(*_: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("storage", ["journal", "sqlite"])
def test_nobody_makes_the_file_out_of_turn(tmp_path, monkeypatch, storage):
    (tmp_path / "run" / "claims").mkdir(parents=True)
    (tmp_path / "run" / "claims" / ".lock").touch()
    clock = count(0, 100)
    monkeypatch.setattr("mmtrain.sweep.study.time.monotonic", lambda: next(clock))
    with held_elsewhere(tmp_path), pytest.raises(ConfigError, match="is in use by"):
        Study(sweep(tmp_path, storage=storage))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["claims"]


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "claims").touch()
    with pytest.raises(ConfigError, match=r"claims cannot be written"):
        Study(sweep(tmp_path))


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
    like = replace(other, params={**other.params, VARIANT: "a"})
    assert study.judge(like, 10)(bad)
    assert not study.judge(replace(like, seed=7), 10)(bad)  # a repetition is there to be compared


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
