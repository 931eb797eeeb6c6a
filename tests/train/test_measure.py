"""What the loop measures between steps, and what its routers did."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmtrain.config.schema import Eval, Matching, Recipe
from mmtrain.run.metrics import read_metrics
from tests.evaluate import checkpoints
from tests.train import jobs, tasks, tiny


def test_matching_is_measured_without_held_out_sources(make: Callable[..., Recipe], tmp_path: Path) -> None:
    statements, images = checkpoints.statements(tmp_path), checkpoints.pictures(tmp_path / "images")
    measured = Eval(every=2, matching=Matching(str(statements), str(images)))
    recipe = make(tmp_path / "run", steps=3, eval=measured, model=tiny.sparse_model())
    ended = jobs.run(tmp_path / "log", tasks.trained, recipe)
    assert ended.value == 0, ended.log
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [sorted(line["held_out"]) for line in lines] == [[], [], []]
    assert [line["matching"].get("count") for line in lines] == [None, 7, 7]
    assert lines[1]["matching"]["true_labels"] == pytest.approx(3 / 7)
    for line in lines:  # experts in all three parts; the value is 1 where use is even
        assert sorted(line["switch"]) == ["connector", "decoder", "vision"]
        for part, value in line["switch"].items():
            shares = line["expert_shares"][part].values()
            least = min(len(row) * min(row) for row in shares)
            most = max(len(row) * max(row) for row in shares)
            assert least <= value <= most, part
