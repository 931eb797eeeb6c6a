"""A fault, then the same command: the run ends as if nothing had happened. tests.faults.campaign draws many more."""

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mmtrain.config.schema import Recipe
from mmtrain.data.loader import Loader
from mmtrain.run.guard import EXIT_REQUEUE
from mmtrain.run.heartbeat import EXIT_STALLED
from tests.data.inputs import tokenizer
from tests.faults import job
from tests.faults.compare import difference
from tests.faults.inject import Fault


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = job.recipe(shards, folder / "run", tokenizer())
    ended = job.attempt(recipe, folder / "log")
    assert ended.codes == [0, 0], ended.log
    return recipe


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (Fault("SIGKILL", 1, 5, "backward"), None, ""),
        (Fault("SIGSTOP", 1, 5, "update"), EXIT_STALLED, "rank 1 has stalled: no sign of life for "),
        (Fault("hang", 1, 5, "data_wait"), EXIT_STALLED, "rank 1 stalled in data_wait of step 5 for "),
        (Fault("SIGUSR1", 1, 5, "data_wait"), EXIT_REQUEUE, "stopped after step 5: SIGUSR1"),
        (Fault("exception", 1, 5, "update"), None, "injected: a defect on one rank"),
        (Fault("killed in a file", 1, 4), None, ""),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_the_same_command_goes_on(
    shards: Path, whole: Recipe, tmp_path: Path, fault: Fault, code: int | None, words: str
) -> None:
    recipe = job.recipe(shards, tmp_path / "run", tokenizer(), stall=job.STALL if code == EXIT_STALLED else 60.0)
    broken = job.attempt(recipe, tmp_path / "log", fault)
    assert not broken.hung and all(broken.codes), broken.log
    assert words in broken.log and (code is None or broken.codes[0] == code), (broken.codes, broken.log)
    again = job.attempt(recipe, tmp_path / "log")
    assert again.codes == [0, 0] and "going on after step" in again.log, again.log
    assert difference(recipe, whole) == ""


@pytest.fixture(scope="module")
def told_to_skip(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """told_to_skip(*steps): a clean run that leaves these steps out."""

    @cache
    def run(*steps: int) -> Recipe:
        folder = tmp_path_factory.mktemp("clean")
        recipe = job.recipe(shards, folder / "run", tokenizer(), skip_steps=steps)
        ended = job.attempt(recipe, folder / "log")
        assert ended.codes == [0, 0], ended.log
        return recipe

    return run


@pytest.mark.parametrize(
    ("fault", "left_out", "words"),
    [
        (Fault("NaN in loss", 1, 5), [5], "loss nan and gradient norm nan"),
        (Fault("NaN in one gradient", 0, 5), [5], "gradient norm nan"),
        (Fault("spike", 1, 5), [5], "above 50 times"),
        (Fault("NaN in loss", 0, 5, steps=3), [4, 5, 6, 7], "went back to the weights of step 3"),
    ],
    ids=["NaN in loss", "NaN in one gradient", "spike", "going back"],
)
def test_unusable_steps_are_as_if_a_person_had_left_them_out(
    shards: Path, told_to_skip: Callable[..., Recipe], tmp_path: Path, fault: Fault, left_out: list[int], words: str
) -> None:
    recipe = job.recipe(shards, tmp_path / "run", tokenizer())
    ended = job.attempt(recipe, tmp_path / "log", fault)
    assert ended.codes == [0, 0] and words in ended.log, ended.log
    clean = told_to_skip(*left_out)
    assert difference(recipe, clean, left_out) == ""
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["skipped_steps"], report["rollbacks"]) == (fault.steps, int(fault.steps > 1))
    told = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if line["packs"]] == list(range(5, 5 + fault.steps))
    samples = pack_samples(recipe, 5)
    assert told[0]["packs"] == {str(16 + number): keys for number, keys in enumerate(samples)}


def pack_samples(recipe: Recipe, step: int) -> list[list[str]]:
    """Keys of the samples of each pack of a step, by a plan of one process."""
    with Loader(recipe, tokenizer(), 0, 1) as loader:
        return next(itertools.islice(loader, step - 1, None)).pack_keys
