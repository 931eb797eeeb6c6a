"""Workers train real trials in their own process: parents, results, divergence, interruption, budgets."""

import json
import math
from pathlib import Path

import pytest

from mmtrain.config.load import dump
from mmtrain.run.metrics import read_metrics
from mmtrain.run.retain import committed
from mmtrain.sweep.spec import Budget, read_sweep
from mmtrain.sweep.study import Study
from mmtrain.sweep.trial import Cost, step_cost
from mmtrain.sweep.worker import affordable
from tests.data.inputs import tokenizer
from tests.sweep import tasks
from tests.train import jobs, tiny
from tests.train.tiny import SPARSE

SWEEP = """
name: tiny
recipe: sparse.yaml
parent: {recipe: dense.yaml}
out: OUT
sampler: grid
set: [log.plots=false]
search:
  optim.lr: {choices: [0.001, 1.0e+30, 0.003]}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of a stage with experts, on a dense parent, over rates of which one is absurd."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_shards(folder / "shards", tokenizer())
    dense = tiny.measured(tiny.recipe(folder / "shards", folder / "unused", tokenizer()), every=100)
    (folder / "dense.yaml").write_text(dump(dense))
    moe = f"{{num_experts: {SPARSE.num_experts}, top_k: {SPARSE.top_k}}}"
    (folder / "sparse.yaml").write_text(
        f"base: dense.yaml\nrequires_pretrained: true\nsteps: 6\nupcycle: {{vision: {{}}, decoder: {{}}}}\n"
        f"model: {{vision: {{moe: {moe}}}, decoder: {{moe: {moe}}}}}\n"
    )
    path = folder / "sweep.yaml"
    path.write_text(SWEEP.replace("OUT", str(folder / "run")))
    return path


@pytest.mark.timeout(400)
def test_trials_are_trained_interrupted_gone_on_with_and_kept(file, tmp_path):
    stopped = jobs.run(tmp_path / "a", tasks.worked_until, file, 2, 3)
    assert stopped.value == 75, stopped.log
    sweep = read_sweep(file)
    first, absurd, last = Study(sweep, create=False).trials()
    assert (first.state, absurd.state, last.state) == ("done", "diverged", "running")
    assert math.isinf(absurd.loss) and first.facts["steps"] == 6 and first.facts["seed"] == 0
    assert committed(sweep.out / "trials" / "0002")
    ended = jobs.run(tmp_path / "b", tasks.worked, file)
    assert ended.value == 0, ended.log
    trials = Study(sweep, create=False).trials()
    assert [trial.state for trial in trials] == ["done", "diverged", "done"]
    # the interrupted trial went on where it was: its curve is that of one run, and no step is there twice
    assert [step for step, _ in trials[2].facts["curve"]] == [1, 2, 3, 4, 5, 6]
    for trial in trials:
        folder = sweep.out / "trials" / f"{trial.number:04d}"
        assert not committed(folder) and (folder / "metrics.jsonl").exists()
    lines = read_metrics(sweep.out / "trials" / "0000" / "metrics.jsonl")
    assert trials[0].loss == lines[-1]["held_out"]["all"]
    assert f"weights from {sweep.out / 'parents' / 'all'}" in stopped.log
    report = json.loads((sweep.out / "parents" / "all" / "report.json").read_text())
    assert report["steps"] == 4
    recipe = sweep.recipe_of(trials[0].params, tmp_path / "x", (f"init_from={sweep.out / 'parents' / 'all'}",))
    assert trials[0].facts["flops"] == pytest.approx(6 * step_cost(recipe).flops)
    assert trials[0].facts["active"] < trials[0].facts["parameters"]


def test_a_steps_cost_is_what_its_data_take(file, tmp_path):
    sweep = read_sweep(file)
    recipe = sweep.recipe_of(sweep.points()[0], tmp_path / "x")
    cost = step_cost(recipe)
    most = recipe.data.global_batch * recipe.data.sequence_length
    assert 0.5 * most < cost.tokens <= most and cost.flops > 6 * 1000 * cost.tokens


@pytest.mark.parametrize(
    ("budget", "steps"), [(Budget(tokens=1000), 10), (Budget(flops=350), 3), (Budget(tokens=5), 1)]
)
def test_a_budget_is_whole_steps_and_at_least_one(budget, steps):
    assert affordable(budget, Cost(tokens=100.0, flops=100.0)) == steps
