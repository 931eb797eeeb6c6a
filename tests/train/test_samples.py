"""Too many bad samples: one verdict of all ranks, about all that the run has read, whoever read it and when."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Recipe
from mmtrain.data.loader import Loader
from mmtrain.samples import BAD, MIN_SAMPLES, READ, SampleCount
from tests.data.inputs import tokenizer
from tests.train import jobs, tasks
from tests.train.tiny import corrupt_captions, last

LINE = {"shard": "a.tar", "key": "k", "reason": "broken"}


def add(count: SampleCount, samples: int, bad: int, lines: tuple[dict[str, Any], ...] = (LINE,)) -> None:
    """A step whose sums over all ranks are these; `lines` are those of the other rank, this one has none."""
    groups = SimpleNamespace(all_gather_object=lambda mine: [mine, list(lines)])
    count.add(SimpleNamespace(samples=samples, bad=bad), SimpleNamespace(bad=[]), groups)


def test_a_share_above_the_limit_stops_once_there_are_enough_samples() -> None:
    count = SampleCount(0.2)
    add(count, MIN_SAMPLES - 1, 60)
    with pytest.raises(DataError) as caught:
        add(count, 1, 1)
    assert str(caught.value) == (
        "data: 61 of 100 samples read so far were unusable, more than data.max_bad_fraction=0.2; the last one: shard "
        "a.tar, sample k: broken; repair the shards, or raise data.max_bad_fraction"
    )


def test_the_limit_itself_is_allowed_and_a_step_without_bad_samples_is_never_the_one_that_stops() -> None:
    count = SampleCount(0.2)
    add(count, 100, 20)
    other = SampleCount(0.2, {READ: 100, BAD: 99, "documents/a": 5})
    add(other, 10, 0)
    assert other.as_json() == {READ: 110, BAD: 99} and count.as_json() == {READ: 100, BAD: 20}


def test_two_ranks_stop_together_by_what_the_run_has_read_since_its_first_step(
    make: Callable[..., Recipe], shards: Path, tmp_path: Path
) -> None:
    """One process reads the first steps; two go on. Neither has read enough by itself, nor have both together."""
    captions, entry, _ = corrupt_captions(shards, tmp_path)
    recipe = make(tmp_path / "run", steps=40)
    recipe = replace(
        recipe, data=replace(recipe.data, sources={"captions": captions}, global_batch=8, max_bad_fraction=0.02)
    )
    stops = read = bad = 0
    with Loader(recipe, tokenizer(), 0, 1) as loader:
        for step in loader:
            stops, read, bad = stops + 1, read + step.samples, bad + len(step.bad)
            if read >= MIN_SAMPLES and step.bad:
                break
    half = stops // 2
    assert half >= 1 and bad > 0.02 * read
    ended = jobs.run(tmp_path, tasks.trained, replace(recipe, steps=half))
    assert ended.value == 0, ended.log
    counted = last(recipe).manifest.state.metrics
    assert 0 < counted[BAD] < counted[READ] < read
    legs = jobs.run_ranks(tmp_path / "logs", 2, tasks.trained, replace(recipe, steps=stops))
    words = f"DataError: data: {bad} of {read} samples read so far were unusable, more than data.max_bad_fraction=0.02"
    for leg in legs:
        assert str(leg.value).startswith(words) and f"sample {entry.key}" in leg.value, leg.log
