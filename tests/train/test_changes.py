"""Going on in a folder where something is not as it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config.schema import Checkpoint, Guard, Log, Recipe
from mmtrain.run.lock import RunLock
from mmtrain.run.retain import committed
from tests.train import jobs, tasks
from tests.train.tiny import assert_same_end, curve, model

Copy = Callable[..., Recipe]


@pytest.fixture(scope="module")
def origin(make: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("origin")
    recipe = make(folder / "run", checkpoint=Checkpoint(every=2, keep_last=9))
    ended = jobs.run(folder, tasks.trained, recipe)
    assert ended.value == 0, ended.log
    return recipe


@pytest.fixture
def copy(origin: Recipe, tmp_path: Path) -> Copy:
    """copy(**changes): the finished run in a folder of its own, and its recipe changed."""

    def made(**changes: object) -> Recipe:
        shutil.copytree(origin.out, tmp_path / "run")
        return replace(origin, out=str(tmp_path / "run"), **changes)

    return made


def test_what_may_change_goes_on_and_is_listed(copy: Copy, tmp_path: Path) -> None:
    recipe = copy(steps=6, log=Log(every=2), guard=Guard(max_skips=3))
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value == 0, ended.log
    for line in ("steps: 4 -> 6", "log.every: 1 -> 2", "guard.max_skips: 10 -> 3"):
        assert f"\n  {line}" in ended.log
    assert [line["step"] for line in curve(recipe)] == [1, 2, 3, 4, 6]


def test_every_change_that_may_not_be_is_listed_at_once(copy: Copy, tmp_path: Path) -> None:
    recipe = copy(steps=6)
    recipe = replace(
        recipe,
        optim=replace(recipe.optim, lr=1e-3),
        data=replace(recipe.data, resize="pad"),
        trainable=["decoder.*"],
    )
    allowed = replace(recipe, resume_allow=["optim", "data.resize", "trainable"])
    refused = jobs.run(tmp_path, tasks.trained, recipe).value
    assert refused.startswith(f"ConfigError: {recipe.out}/step_00000004 was trained with another recipe: ")
    for line in ("optim.lr: 0.003 -> 0.001", "data.resize: squash -> pad", "trainable: ['*'] -> ['decoder.*']"):
        assert line in refused
    assert "steps: 4" not in refused and "resume_allow" in refused
    ended = jobs.run(tmp_path, tasks.trained, allowed)
    assert ended.value == 0, ended.log
    assert curve(recipe)[-1]["step"] == 6


def test_another_batch_size_goes_on_with_the_next_pack(copy: Copy, tmp_path: Path) -> None:
    recipe = copy(steps=6, guard=Guard(skip_steps=[6]), resume_allow=["data.global_batch"])
    recipe = replace(recipe, data=replace(recipe.data, global_batch=2))
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value == 0 and "data.global_batch: 4 -> 2" in ended.log, ended.log
    assert [line["step"] for line in curve(recipe)] == [1, 2, 3, 4, 5, 6]
    (skipped,) = (Path(recipe.out) / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["packs"].keys() == {"18", "19"}  # 4 steps of 4, one of 2


def test_the_checkpoint_that_a_run_came_from_is_let_go(copy: Copy, tmp_path: Path) -> None:
    ended = jobs.run(tmp_path, tasks.held_open, copy(steps=6), "step_00000004", 5)
    assert ended.value == [], ended.log


def test_never_refuses_a_folder_with_checkpoints(copy: Copy, tmp_path: Path) -> None:
    recipe = copy(resume="never")
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value.startswith(f"ConfigError: resume=never, but {recipe.out} has checkpoints (steps [2, 4])")


def test_a_folder_that_another_job_uses(copy: Copy, tmp_path: Path) -> None:
    recipe = copy(steps=6)
    lock = RunLock(Path(recipe.out))
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    lock.release()
    assert ended.value.startswith(f"InUse: out: {recipe.out} is in use by process ")
    assert sorted(committed(Path(recipe.out))) == [2, 4]


def test_a_checkpoint_of_another_model(copy: Copy, tmp_path: Path) -> None:
    recipe = copy(steps=6)
    wider = replace(model(), decoder=replace(model().decoder, intermediate_size=64))
    ended = jobs.run(tmp_path, tasks.trained, replace(recipe, model=wider))
    assert "step_00000004 is a checkpoint of another model: 6 shapes differ" in ended.value
    assert "decoder.blocks.0.mlp.down.weight is [32, 48], the model's is [32, 64]" in ended.value


def cut(path: Path) -> None:
    """Half of the file is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit is another."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_damage_costs_steps_and_nothing_else(
    copy: Copy, origin: Recipe, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    recipe = copy()
    damage(Path(recipe.out) / "step_00000004" / "rank_00000.safetensors")
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value == 0, ended.log
    assert "CHECKPOINT PASSED OVER" in ended.log and "going on after step 2" in ended.log
    assert curve(recipe) == curve(origin)
    assert_same_end(recipe, origin)


def test_a_full_disk_leaves_the_last_good_checkpoint(
    make: Callable[..., Recipe], origin: Recipe, tmp_path: Path
) -> None:
    recipe = replace(origin, out=str(tmp_path / "run"))
    full = jobs.run(tmp_path, tasks.without_room, recipe, 3)
    assert full.value.startswith("CheckpointError: CHECKPOINT NOT SAVED: step_00000004: ")
    assert "No space left on device" in full.value and "The last good checkpoint is step 2" in full.value
    assert list(committed(Path(recipe.out))) == [2] and not list(Path(recipe.out).glob("*.tmp"))
    again = jobs.run(tmp_path, tasks.trained, recipe)
    assert again.value == 0 and "going on after step 2" in again.log, again.log
    assert curve(recipe) == curve(origin)
    assert_same_end(recipe, origin)
