"""Steps and samples that are left out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mmtrain.config.schema import Checkpoint, Guard, Recipe
from mmtrain.run.reader import open_checkpoint
from tests.train import jobs, tasks
from tests.train.tiny import corrupt_captions, curve, tensors

Make = Callable[..., Recipe]


def test_skipped_steps_change_nothing_and_are_told(make: Make, tmp_path: Path) -> None:
    recipe = make(
        tmp_path / "run",
        steps=3,
        checkpoint=Checkpoint(every=1, keep_last=9),
        guard=Guard(skip_steps=[2]),
    )
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value == 0, ended.log
    assert [line["skipped"] for line in curve(recipe)] == ["", "listed in guard.skip_steps", ""]
    kinds = ("param", "exp_avg", "exp_avg_sq")
    readers = [open_checkpoint(Path(recipe.out) / f"step_{step:08d}") for step in (1, 2, 3)]
    one, two, three = (tensors(reader, kinds) for reader in readers)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not any(torch.equal(two[key], three[key]) for key in two if key[0] == "exp_avg")
    assert [reader.manifest.state.optimizer_steps for reader in readers] == [1, 1, 2]
    assert readers[1].manifest.state.cursor != readers[0].manifest.state.cursor  # its data is not served again


def test_a_corrupt_image_weighs_nothing(make: Make, shards: Path, tmp_path: Path) -> None:
    captions, entry, shard = corrupt_captions(shards, tmp_path)
    recipe = make(tmp_path / "run", steps=3)
    recipe = replace(
        recipe, data=replace(recipe.data, sources={"captions": captions}, global_batch=8, max_bad_fraction=1.0)
    )
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value == 0, ended.log
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert lines and {(line["source"], line["key"]) for line in lines} == {("captions", entry.key)}
    assert all(line["shard"] == shard.path and line["reason"] and line["step"] in (1, 2, 3) for line in lines)
    assert "sample left out" in ended.log and len(curve(recipe)) == 3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["skipped_samples"] == {"captions": len(lines)}
    assert report["lost_tokens"] == {"captions": sum(line["tokens"] for line in lines)}
    assert all(line["tokens"] > entry.tokens for line in lines)  # its image's places as well


def test_a_run_that_diverges_stops_with_the_samples_of_the_step(make: Make, tmp_path: Path) -> None:
    recipe = make(tmp_path / "run", steps=30, guard=Guard(max_skips=1))
    recipe = replace(recipe, optim=replace(recipe.optim, lr=1e30, warmup_steps=0, clip=0.0))
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value.startswith("TrainingStopped: step 3: loss"), ended.log
    assert "unusable step 2 of this run, guard.max_skips is 1. Samples of the step: " in ended.value
    assert "guard.skip_steps" in ended.value


def test_a_run_that_fails_finishes_the_checkpoint_that_is_being_written(make: Make, tmp_path: Path) -> None:
    recipe = make(tmp_path / "run", steps=30, guard=Guard(max_skips=0), checkpoint=Checkpoint(every=1))
    recipe = replace(recipe, optim=replace(recipe.optim, lr=1e30, warmup_steps=0, clip=0.0))
    ended = jobs.run(tmp_path, tasks.with_a_slow_disk, recipe, 2.0)
    assert ended.value.startswith("TrainingStopped: step 2: loss"), ended.log
    assert open_checkpoint(tmp_path / "run" / "step_00000001").manifest.step == 1
