"""A run that was interrupted is the undisturbed run, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config.schema import Checkpoint, Parallel, Recipe
from mmtrain.run.guard import EXIT_REQUEUE, EXIT_STOPPED
from mmtrain.run.retain import committed
from tests.train import jobs, tasks
from tests.train.tiny import assert_same_end, curve, measured, sparse_model

STEPS, EVERY = 8, 3


def stage(make: Callable[..., Recipe], out: Path) -> Recipe:
    """Experts in all parts, both ways of balancing, held-out losses."""
    kept = Checkpoint(every=EVERY, keep_last=9)
    return measured(make(out, model=sparse_model(), steps=STEPS, checkpoint=kept), every=4)


@pytest.fixture(scope="module")
def whole(make: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = stage(make, folder / "run")
    ended = jobs.run(folder, tasks.trained, recipe)
    assert ended.value == 0, ended.log
    return recipe


def test_the_undisturbed_run_is_worth_comparing(whole: Recipe) -> None:
    lines = curve(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["grad_norm"] > whole.optim.clip for line in lines)  # clipping is part of what is compared
    assert len({line["grad_norm"] for line in lines}) == STEPS
    assert set(lines[3]["held_out"]) == {"captions", "text", "all"}
    assert set(lines[0]["expert_shares"]["vision"]) == {"1"} and set(lines[0]["expert_shares"]["decoder"]) == {"0", "1"}
    assert list(committed(Path(whole.out))) == [3, 6, 8]


@pytest.mark.parametrize(
    ("task", "code"),
    [(tasks.stopped_by_file, EXIT_STOPPED), (tasks.stopped_by_signal, EXIT_REQUEUE)],
    ids=["stop file", "SIGTERM"],
)
def test_stopped_and_started_again(
    make: Callable[..., Recipe],
    whole: Recipe,
    tmp_path: Path,
    task: Callable[..., int],
    code: int,
) -> None:
    recipe = stage(make, tmp_path / "run")
    first = jobs.run(tmp_path, task, recipe, 5)
    assert first.value == code and "stopped after step 5" in first.log, first.log
    assert list(committed(Path(recipe.out))) == [3, 5]
    second = jobs.run(tmp_path, tasks.trained, recipe)
    assert second.value == 0 and "going on after step 5" in second.log, second.log
    assert curve(recipe) == curve(whole)
    assert_same_end(recipe, whole)


def test_who_is_told_to_stop_saves_first(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = measured(make(tmp_path / "run", steps=3), every=1)
    first = jobs.run(tmp_path, tasks.in_order, recipe, 2)
    assert first.value == (EXIT_STOPPED, ["measure", "save", "measure", "report"]), first.log
    assert "step 2: report.json and plots are not complete" in first.log and "No space left" in first.log
    assert list(committed(Path(recipe.out))) == [2]
    whole = replace(recipe, out=str(tmp_path / "whole"))
    ended = jobs.run(tmp_path, tasks.in_order, whole, 3)  # what the last checkpoint has overtaken is never made
    assert ended.value == (EXIT_STOPPED, ["measure", "measure", "measure", "report", "save"]), ended.log


@pytest.mark.parametrize(
    ("function", "code", "steps"), [("assemble", EXIT_REQUEUE, [1]), ("finish", 0, [2])], ids=["before", "after"]
)
def test_a_signal_outside_of_the_loop_ends_nothing_halfway(
    make: Callable[..., Recipe], tmp_path: Path, function: str, code: int, steps: list[int]
) -> None:
    recipe = make(tmp_path / "run", steps=2)
    ended = jobs.run(tmp_path, tasks.signalled_outside_of_the_loop, recipe, function)
    assert (ended.code, ended.value) == (0, code), ended.log
    assert list(committed(Path(recipe.out))) == steps


def test_killed_between_two_checkpoints(make: Callable[..., Recipe], whole: Recipe, tmp_path: Path) -> None:
    recipe = stage(make, tmp_path / "run")
    first = jobs.run(tmp_path, tasks.killed, recipe, 5, 3)
    assert first.code == -9 and first.value is None
    assert [line["step"] for line in curve(recipe)] == [1, 2, 3, 4, 5]
    (Path(recipe.out) / "step_00000006.tmp").mkdir()  # what a kill inside a save leaves
    second = jobs.run(tmp_path, tasks.trained, recipe)
    assert second.value == 0 and "going on after step 3" in second.log, second.log
    assert "removed" in second.log and "step_00000006.tmp" in second.log
    assert curve(recipe) == curve(whole)
    assert_same_end(recipe, whole)


def test_a_run_that_is_done_stays_as_it_is(whole: Recipe, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(whole.out).rglob("*") if path.name != ".lock"}
    again = jobs.run(tmp_path, tasks.trained, whole)
    assert again.value == 0 and f"all {STEPS} steps are done" in again.log, again.log
    after = {path: path.stat().st_mtime_ns for path in Path(whole.out).rglob("*") if path.name != ".lock"}
    assert {path for path in before if path.is_file()} == {path for path in after if path.is_file()}
    assert all(before[path] == after[path] for path in before if path.is_file())


def test_two_ranks_stop_together_when_one_is_told(make: Callable[..., Recipe], tmp_path: Path) -> None:
    layout = Parallel(zero_stage=2, expert=2)
    alone, broken = (
        make(tmp_path / name, model=sparse_model(), steps=5, parallel=layout) for name in ("alone", "broken")
    )
    assert [end.value for end in jobs.run_ranks(tmp_path / "logs", 2, tasks.trained, alone)] == [0, 0]
    told = jobs.run_ranks(tmp_path / "logs", 2, tasks.stopped_by_signal, broken, 3, 1)
    assert [end.value for end in told] == [EXIT_REQUEUE] * 2, told[0].log
    assert list(committed(Path(broken.out))) == [3]
    again = jobs.run_ranks(tmp_path / "logs", 2, tasks.trained, broken)
    assert [end.value for end in again] == [0, 0], again[0].log
    assert curve(broken) == curve(alone)
    assert_same_end(broken, alone)
