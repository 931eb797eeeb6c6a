"""How trials end, and what becomes of them. No training here: what it would come to is put in its place."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.schema import Recipe
from mmtrain.run.guard import StopFlag
from mmtrain.sweep import trial, worker
from mmtrain.sweep.spec import Budget, Choices, Parent, Sweep
from mmtrain.sweep.study import ATTEMPTS, Study
from mmtrain.sweep.trial import Cost, Outcome
from mmtrain.sweep.worker import work

RECIPE = """
name: small
out: nowhere
steps: 10
data: {tokenizer: nowhere.json, sources: {a: {shards: nowhere}}, global_batch: 2}
model: {decoder: {hidden_size: 32, num_heads: 2, num_kv_heads: 1}}
"""
RATES = {"optim.lr": Choices((0.1, 0.2, 0.4))}


@pytest.fixture
def sweep(tmp_path):
    """sweep(search, ...): a grid over a recipe and its parent."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = tmp_path / "recipe.yaml"

    def made(search: dict = RATES, **changes) -> Sweep:
        whole = {"file": tmp_path / "sweep.yaml", "name": "s", "recipe": recipe, "out": tmp_path / "run"}
        return Sweep(**{**whole, "search": search, "sampler": "grid", "parent": Parent(recipe), **changes})

    return made


@pytest.fixture
def stub(monkeypatch):
    """stub(ending, parent): replaces the training of a trial and of a parent."""
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(worker, "step_cost", lambda recipe: Cost(100.0 * recipe.data.global_batch, 1.0))
    monkeypatch.setattr(worker, "newest", lambda recipe: Path(recipe.out))

    def replaced(ending: Callable[[Recipe], object] = lambda recipe: None, parent: Callable = lambda recipe: 0) -> None:
        def run(recipe: Recipe, *_: object) -> Outcome:
            return ending(recipe) or Outcome("done", recipe.optim.lr, recipe.steps, [(1, 2.0)])

        monkeypatch.setattr(worker, "run_trial", run)
        monkeypatch.setattr(worker, "ensure", parent)

    return replaced


def raising(error: Exception | type[BaseException], when: Callable[[Recipe], bool] = lambda recipe: True) -> Callable:
    def function(recipe: Recipe) -> None:
        if when(recipe):
            raise error

    return function


def states(sweep: Sweep) -> list[str]:
    return [found.state for found in Study(sweep, create=False).trials()]


def start(sweep: Sweep) -> int:
    return work(sweep, Study(sweep), lambda: None)


def test_a_trial_that_takes_its_workers_with_it_is_counted_out(sweep, stub):
    stub(raising(RuntimeError("out of memory"), lambda recipe: recipe.optim.lr == 0.1))
    for _ in range(ATTEMPTS):
        with pytest.raises(RuntimeError):
            start(sweep())
        assert states(sweep()) == ["running", "waiting", "waiting"]
    assert start(sweep()) == 0
    assert states(sweep()) == ["failed", "done", "done"]


@pytest.mark.parametrize("error", [DataError("no such shard"), KeyboardInterrupt])
@pytest.mark.parametrize("where", ["trial", "parent"])
def test_what_a_person_can_mend_costs_no_trial(sweep, stub, error, where):
    stub(**{"ending" if where == "trial" else "parent": raising(error)})
    for _ in range(ATTEMPTS + 1):
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            start(sweep())
    stub()
    assert start(sweep()) == 0
    assert states(sweep()) == ["done"] * 3


def test_a_stop_while_the_parent_learns_is_an_interruption(sweep, stub):
    for _ in range(ATTEMPTS + 1):
        stub(parent=lambda recipe: 75)
        assert start(sweep()) == 75
    stub()
    assert start(sweep()) == 0
    assert states(sweep()) == ["done"] * 3


@pytest.mark.parametrize(("saved", "trained"), [(40, 1), (300, 0)])
def test_a_parent_that_was_stopped_is_not_one_that_has_ended(tmp_path, monkeypatch, saved, trained):
    started = []
    monkeypatch.setattr(trial, "train", lambda recipe: started.append(recipe) or 0)
    (tmp_path / f"step_{saved:08d}").mkdir()
    (tmp_path / "report.json").write_text("{}")
    assert trial.ensure(Recipe(name="parent", out=str(tmp_path), steps=300)) == 0
    assert len(started) == trained


def test_a_point_whose_training_is_refused_is_counted_out(sweep, stub):
    stub(raising(ConfigError("other factors in its forward"), lambda recipe: recipe.optim.lr == 0.1))
    with pytest.raises(ConfigError):
        start(sweep())
    assert start(sweep()) == 0
    assert states(sweep()) == ["failed", "done", "done"]


def test_a_signal_after_a_trials_last_step_ends_the_worker(sweep, stub):
    def told(recipe: Recipe) -> None:
        with StopFlag(Path(recipe.out)):
            os.kill(os.getpid(), signal.SIGUSR1)

    stub(told)
    assert start(sweep()) == 75
    assert states(sweep()) == ["done", "waiting", "waiting"]


def test_the_stop_file_of_a_sweep_is_for_all_its_workers(sweep, stub):
    stub()
    chosen = sweep()
    chosen.out.mkdir()
    (chosen.out / "stop").touch()
    assert start(chosen) == start(chosen) == 76
    (chosen.out / "stop").unlink()
    assert start(chosen) == 0


def test_a_trial_is_told_to_end_until_it_has(tmp_path, monkeypatch):
    def learnt(recipe: Recipe) -> int:
        for _ in range(2):
            while not (tmp_path / "stop").exists():
                time.sleep(0.001)
            (tmp_path / "stop").unlink()  # what a run does with the file of an earlier one
        return 76

    monkeypatch.setattr(trial, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(trial, "train", learnt)
    assert trial.run_trial(Recipe(name="a", out=str(tmp_path)), "all", lambda curve: True).ending == "pruned"


def test_a_worker_that_waits_for_the_parent_hears_a_signal(sweep, stub, monkeypatch):
    def busy(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise worker.InUse("out: is in use")

    stub()
    monkeypatch.setattr(worker, "RunLock", busy)
    assert start(sweep()) == 75
    assert states(sweep()) == ["running", "waiting", "waiting"]


def test_a_parents_folder_that_cannot_be_written_is_told(sweep, stub):
    stub()
    chosen = sweep()
    chosen.out.mkdir()
    (chosen.out / "parents").touch()
    with pytest.raises(ConfigError, match=r"all\.claim cannot be written"):
        start(chosen)


def test_a_point_that_is_no_recipe_is_counted_out(sweep, stub):
    stub()
    chosen = sweep({"model.decoder.num_kv_heads": Choices((2, 3, 1))})
    with pytest.raises(ConfigError, match=r"num_heads=2 is not a multiple of model\.decoder\.num_kv_heads=3"):
        start(chosen)
    assert start(chosen) == 0
    assert states(chosen) == ["done", "failed", "done"]


def test_a_budget_is_cut_by_each_points_own_steps(sweep, stub):
    stub()
    chosen = sweep({"data.global_batch": Choices((1, 4)), "seed": Choices((0, 1))}, budget=Budget(tokens=2000.0))
    assert start(chosen) == 0
    facts = [found.facts for found in Study(chosen, create=False).trials()]
    assert [(fact["steps"], fact["tokens"]) for fact in facts] == [(20, 2000.0)] * 2 + [(5, 2000.0)] * 2


@pytest.mark.parametrize("number", ["language_loss", "loss", "grad_norm"])
def test_a_step_that_is_left_out_for_its_numbers_is_divergence(tmp_path, monkeypatch, number):
    line = {"step": 1, "language_loss": 2.0, "loss": 2.1, "grad_norm": 1.0, "held_out": {"all": 2.0}}

    def learnt(recipe: Recipe) -> int:
        lines = [{**line, number: None}, {**line, "step": 2}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        return 0

    monkeypatch.setattr(trial, "train", learnt)
    outcome = trial.run_trial(Recipe(name="a", out=str(tmp_path)), "all", lambda curve: False)
    assert (outcome.ending, outcome.loss) == ("diverged", math.inf)
    number = "skipped"
    assert trial.run_trial(Recipe(name="a", out=str(tmp_path)), "all", lambda curve: False).loss == 2.0
