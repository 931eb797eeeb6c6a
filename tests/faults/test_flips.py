"""A flipped bit is found; `python -m tests.faults.flips` draws 1,000 of them."""

import random
from pathlib import Path

import pytest

from mmtrain.config.schema import Recipe
from mmtrain.run.retain import committed
from tests.faults import flips
from tests.train import jobs


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run."""
    return flips.origin(shards, tmp_path_factory.mktemp("flips"))


@pytest.fixture
def steps(run: Recipe) -> list[str]:
    """Folders of its checkpoints."""
    return [str(path) for path in committed(Path(run.out)).values()]


@pytest.mark.parametrize("place", flips.PLACES)
def test_a_flipped_bit_is_found_and_its_file_named(steps: list[str], tmp_path: Path, place: str) -> None:
    draws = random.Random(place)
    for _ in range(5):
        assert flips.missed(Path(steps[-1]), flips.draw(Path(steps[-1]), place, draws), tmp_path) == ""


@pytest.mark.parametrize("place", ["manifest", "tensors"])
def test_a_resume_takes_the_checkpoint_before(run: Recipe, tmp_path: Path, place: str) -> None:
    assert flips.passed_over(run, place, random.Random(place), tmp_path / "again") == ""


def test_a_whole_checkpoint_is_described(run: Recipe, steps: list[str], tmp_path: Path) -> None:
    ended = jobs.run(tmp_path, flips.inspect, str(run.out), "--tensors")
    assert ended.code == 0, ended.log
    assert f"{steps[-1]}: whole; 3 files, " in ended.log and "step 4, 4 updates, registry " in ended.log
    assert "written by expert 1, tensor 1, world 1, zero_stage 2, at commit " in ended.log
    assert "  decoder.embedding.weight [400, 32]" in ended.log
    same = jobs.run(tmp_path, flips.inspect, steps[-1], steps[-1])
    assert same.code == 0 and "\n0 differences; " in same.log, same.log


def test_two_that_differ_are_told_apart(run: Recipe, steps: list[str], tmp_path: Path) -> None:
    ended = jobs.run(tmp_path, flips.inspect, *steps[-2:])
    assert ended.code == 1, ended.log
    for line in ("step: 3 and 4", "optimizer_steps: differs", "cursor: differs"):
        assert f"\n{line}\n" in ended.log
    assert "\nparam decoder.embedding.weight: relative difference " in ended.log


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    ended = jobs.run(tmp_path / "log", flips.inspect, str(tmp_path / "nowhere"))
    assert ended.code == 2 and ended.log.startswith(f"error: {tmp_path / 'nowhere'}: no such folder."), ended.log
