"""A transfer from end to end, on a study and a target of a few thousand weights."""

import json
from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.config.load import dump, load
from mmtrain.config.schema import Mup
from mmtrain.run.retain import committed
from mmtrain.sweep.spec import read_sweep
from mmtrain.sweep.study import Study
from tests.data.inputs import tokenizer, write_lines
from tests.sweep import tasks
from tests.train import jobs, tiny
from tests.train.tasks import trained
from tools.bench.transfer import ARMS, Questions, Run, check_parent, measure, recipe_of, runs, summary

SWEEP = """
name: tiny
recipe: dense.yaml
out: OUT
sampler: grid
search:
  optim.lr: {choices: [0.001, 0.002]}
  mup.lr.vision: {choices: [0.5]}
"""
BASE = "mup.base={decoder: {hidden_size: 32, num_heads: 4, num_kv_heads: 2, intermediate_size: 48}}"
WIDE = """
base: dense.yaml
model:
  decoder: {hidden_size: 64, num_heads: 8, num_kv_heads: 4, intermediate_size: 96}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a proxy with its sweep, a target of twice its width, questions."""
    folder = tmp_path_factory.mktemp("transfer")
    tiny.write_shards(folder / "shards", tokenizer())
    dense = tiny.recipe(folder / "shards", folder / "unused", tokenizer(), mup=Mup())
    (folder / "dense.yaml").write_text(dump(tiny.measured(dense, every=4)))
    (folder / "wide.yaml").write_text(WIDE)
    (folder / "sweep.yaml").write_text(SWEEP.replace("OUT", str(folder / "study")))
    lines = [{"question_id": n, "image": f"{n}.png", "question": "No?", "answers": ["yes"]} for n in range(3)]
    write_lines(folder / "questions.jsonl", lines)
    return folder


def whole(folder: Path) -> dict:
    """Parent, proxy's study, target; a rate that diverges in the scan."""
    plain = load(folder / "wide.yaml", [f"out={folder / 'parent_sp'}"])
    scaled = load(folder / "wide.yaml", [f"out={folder / 'parent_mup'}", BASE])
    if not committed(Path(scaled.out)):
        assert tasks.worked(folder / "sweep.yaml") == trained(plain) == trained(scaled) == 0
    return measured(folder, {"mup": scaled.out, "sp": plain.out}, 3)


def measured(folder: Path, parents: dict[str, str], limit: int) -> dict:
    asked = Questions("vqa", folder / "questions.jsonl", folder / "shards" / "raw", limit)
    planned = runs(ARMS, [0], [1.0, 1e33])
    return measure(folder / "sweep.yaml", folder / "wide.yaml", None, folder / "out", parents, asked, planned)


@pytest.mark.timeout(400)
def test_every_run_is_trained_once_and_asked(folder, tmp_path):
    first = jobs.run(tmp_path / "a", whole, folder)
    assert first.code == 0, first.log
    found = first.value
    by_name = {(row["arm"], row["factor"]): row for row in found["runs"]}
    assert list(by_name) == [*((arm, 1.0) for arm in ARMS), ("mup", 1e33)]
    *compared, absurd = by_name.values()
    assert absurd["ending"] == "diverged" and "scores" not in absurd
    assert [row["steps"] for row in compared] == [4] * 4
    assert len({row["scores"]["loss"] for row in compared}) == 4
    carried, plain, *untuned = compared
    assert carried["lr"] == plain["lr"] and {row["lr"] for row in untuned} == {load(folder / "wide.yaml").optim.lr}
    assert 0.0 <= carried["scores"]["accuracy"] <= 1.0 and not committed(folder / "out" / "mup_x1_seed0")
    assert found["tuning_trials"] == 2 and found["tuning_over_target"] == found["tuning_flops"] / found["target_flops"]
    trained_at = [path.stat().st_mtime_ns for path in sorted((folder / "out").rglob("metrics.jsonl"))]
    again = jobs.run(tmp_path / "b", whole, folder)
    assert again.value == found and len(trained_at) == 5
    assert [path.stat().st_mtime_ns for path in sorted((folder / "out").rglob("metrics.jsonl"))] == trained_at
    parents = {"mup": str(folder / "parent_mup"), "sp": str(folder / "parent_sp")}
    with pytest.raises(ConfigError, match=r"mup_x1_seed0 was made with another limit; remove it, or give a new --out"):
        measured(folder, parents, 2)
    with pytest.raises(ConfigError, match=r"--mup-parent .*parent_sp was trained without mup.base, in SP; give a"):
        measured(folder, {**parents, "mup": parents["sp"]}, 3)
    with pytest.raises(ConfigError, match=r"--sp-parent .*parent_mup was trained with mup.base, so it is no SP; give"):
        measured(folder, {**parents, "sp": parents["mup"]}, 3)
    with pytest.raises(
        ConfigError, match=r"parent_mup was trained at another base .* hold at: decoder.num_heads 4 there"
    ):
        check_parent("mup", parents["mup"], {"decoder": {"hidden_size": 32, "num_heads": 2}})
    for kept in (folder / "out").rglob("measured.json"):  # as an earlier version wrote them
        line = json.loads(kept.read_text())
        assert line["made"].pop("parent") and line["made"].pop("text of questions")
        kept.with_suffix(".new").write_text(kept.read_text())
        kept.write_text(json.dumps(line))
    assert measured(folder, parents, 3)["found"] == found["found"]
    for kept in (folder / "out").rglob("measured.new"):
        kept.replace(kept.with_suffix(".json"))
    write_lines(
        folder / "questions.jsonl", [{"question_id": 1, "image": "1.png", "question": "Yes?", "answers": ["no"]}]
    )
    with pytest.raises(ConfigError, match=r"mup_x1_seed0 was made with another text of questions; remove it"):
        measured(folder, parents, 3)


def test_a_study_that_goes_on_is_not_measured_with(folder, tmp_path):
    (folder / "more.yaml").write_text(SWEEP.replace("OUT", str(tmp_path)))
    Study(read_sweep(folder / "more.yaml"))
    asked = Questions("vqa", tmp_path, tmp_path, 1)
    with pytest.raises(
        ConfigError, match=r"the study has not ended \(0 trials run, 2 are to come\), so its best point may"
    ):
        measure(folder / "more.yaml", folder / "wide.yaml", None, tmp_path, {}, asked, [])


def test_an_arm_has_the_base_and_the_values_that_it_is_named_for(folder, tmp_path):
    origin = {"values": {"optim.lr": 0.002, "mup.lr.vision": 0.5}, "base": {"decoder": {"hidden_size": 32}}}
    carried, parents, target = tmp_path / "transferred.yaml", {"mup": "a", "sp": "b"}, folder / "wide.yaml"
    carried.write_text(
        f"base: {target}\noptim: {{lr: 0.002}}\nmup: {{base: {{decoder: {{hidden_size: 32}}}}, lr: {{vision: 0.5}}}}\n"
    )
    mup, sp, mup_untuned, sp_untuned = (recipe_of(Run(a, 1.0, 7), target, tmp_path, origin, parents) for a in ARMS)
    for recipe in (mup, sp):
        assert (recipe.optim.lr, recipe.mup.lr, recipe.seed) == (0.002, {"vision": 0.5}, 7)
    for recipe in (mup_untuned, sp_untuned):
        assert (recipe.optim, recipe.mup.lr, recipe.seed) == (load(target).optim, {}, 7)
    for recipe in (mup, mup_untuned):
        assert recipe.mup.base == {"decoder": {"hidden_size": 32}} and recipe.init_from == "a"
    for recipe in (sp, sp_untuned):
        assert not recipe.mup.base and recipe.init_from == "b"
    assert recipe_of(Run("mup", 4.0, 7), target, tmp_path, origin, parents).optim.lr == 0.008
    assert len({recipe.out for recipe in (mup, sp, mup_untuned, sp_untuned)}) == 4


def test_a_target_with_a_base_is_no_SP(folder, tmp_path):
    (tmp_path / "target.yaml").write_text(
        f"base: {folder / 'wide.yaml'}\nmup: {{base: {{decoder: {{hidden_size: 32}}}}}}\n"
    )
    asked = Questions("vqa", tmp_path, tmp_path, 1)
    with pytest.raises(ConfigError, match=r"target.yaml names mup.base, so as it stands it is no SP"):
        measure(folder / "sweep.yaml", tmp_path / "target.yaml", None, tmp_path, {}, asked, runs(ARMS, [0], [1.0]))


def test_the_comparison_comes_before_the_scan():
    names = [one.name() for one in runs(["mup", "sp"], [0, 1], [0.5, 1.0])]
    assert names == ["mup_x1_seed0", "mup_x1_seed1", "sp_x1_seed0", "sp_x1_seed1", "mup_x0.5_seed0", "mup_x0.5_seed1"]
    assert [one.name() for one in runs(["sp_untuned"], [3], [0.5])] == ["sp_untuned_x1_seed3"]


def row(arm: str, factor: float, loss: float | None, accuracy: float = 0.5) -> dict:
    found = {"arm": arm, "factor": factor}
    return found if loss is None else {**found, "scores": {"loss": loss, "accuracy": accuracy}}


def test_arms_are_compared_by_their_means_over_seeds():
    rows = [row("mup", 1.0, 1.0, 0.4), row("mup", 1.0, 2.0, 0.6), row("sp", 1.0, 4.0), row("sp", 1.0, None)]
    rows += [
        row("mup_untuned", 1.0, 3.0, 0.25),
        row("mup", 0.5, 1.2),
        row("mup", 0.5, 1.4),
        row("mup", 0.25, 3.0),
        row("mup", 2.0, 0.1),
        row("mup", 2.0, None),
    ]
    found = summary(rows)
    assert found["mup"]["loss"] == {"mean": 1.5, "deviation": pytest.approx(0.5**0.5), "lowest": 1.0, "highest": 2.0}
    assert found["mup"]["accuracy"]["mean"] == 0.5
    alone = {"mean": 0.25, "deviation": None, "lowest": 0.25, "highest": 0.25}
    assert found["mup_untuned"]["accuracy"] == alone
    assert found["own_best"]["factor"] == 0.5 and found["own_best"]["interior"] is True
    assert found["loss_above_own_best"] == pytest.approx(0.2)
    diverged = {"mean": None, "deviation": None, "lowest": 4.0, "highest": 4.0}
    assert found["sp"]["diverged"] == 1 and found["sp"]["loss"] == diverged
    assert summary([row("mup", 1.0, 1.0), row("sp", 1.0, None)])["sp"] == {"diverged": 1}
    assert "own_best" not in summary([row("mup", 1.0, 1.0), row("sp", 1.0, 1.0)])
    nowhere = summary([row("mup", 1.0, None), row("mup", 2.0, None), row("sp", 1.0, 1.0)])
    assert nowhere["own_best"] is nowhere["loss_above_own_best"] is None
    beyond = summary([row("mup", 1.0, None), row("mup", 0.5, 2.0), row("sp", 1.0, 1.0)])
    assert beyond["own_best"]["factor"] == 0.5 and beyond["loss_above_own_best"] is None
    assert json.dumps([found, nowhere, beyond], allow_nan=False)
