"""A run that goes on with another number of ranks and another layout is the run of one process."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmtrain.config.schema import Checkpoint, Optim, Parallel, Recipe
from mmtrain.run.guard import EXIT_STOPPED
from tests.train import jobs, tasks
from tests.train.tiny import curve, last, sparse_model, tensors

STEPS = 8
LEGS = (
    (4, Parallel(zero_stage=2, tensor=2, expert=2), 3),
    (2, Parallel(zero_stage=3), 5),
    (1, Parallel(zero_stage=0), STEPS),
)
"""(ranks, layout, last step) of each start of the command."""

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def runs(make: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Recipe]:
    """One process all the way, and the legs above."""
    folder = tmp_path_factory.mktemp("elastic")
    # eps as in tests/parallel: at 1e-8 Adam turns rounding into steps of size lr
    optim = Optim(lr=3e-3, warmup_steps=0, weight_decay=0.1, clip=0.3, eps=1e-4)
    shape = {"model": sparse_model(), "steps": STEPS, "optim": optim, "checkpoint": Checkpoint(every=100, keep_last=9)}
    alone, moving = make(folder / "alone", **shape), make(folder / "moving", **shape)
    ended = jobs.run(folder, tasks.trained, alone)
    assert ended.value == 0, ended.log
    for world, parallel, until in LEGS:
        recipe = replace(moving, parallel=parallel)
        task, code = (tasks.stopped_by_file, EXIT_STOPPED) if until < STEPS else (tasks.trained, 0)
        more = (until,) if until < STEPS else ()
        legs = jobs.run_ranks(folder / f"logs{world}", world, task, recipe, *more)
        assert [leg.value for leg in legs] == [code] * world, legs[0].log
    return alone, moving


def test_every_number_of_the_log_is_that_of_one_process(runs: tuple[Recipe, Recipe]) -> None:
    alone, moving = map(curve, runs)
    assert [line["step"] for line in moving] == list(range(1, STEPS + 1))
    for wanted, found in zip(alone, moving, strict=True):
        for key in ("tokens", "mixture", "padding_share", "expert_shares", "lr"):
            assert found[key] == wanted[key], (wanted["step"], key)
        norms = "grad_norm", "part_norms", "expert_norms", "router_norms", "position_norms"
        for key in ("loss", "language_loss", "loss_by_source", "balance", "z", *norms):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), (wanted["step"], key)
        parts = {"vision", "connector", "decoder"}
        assert found["expert_norms"].keys() == found["router_norms"].keys() == found["part_norms"].keys() == parts
        assert found["position_norms"].keys() == {"text", "image"} and min(found["position_norms"].values()) > 0


def test_the_stream_and_the_weights_end_where_one_process_ends(runs: tuple[Recipe, Recipe]) -> None:
    alone, moving = map(last, runs)
    assert moving.manifest.state.cursor == alone.manifest.state.cursor
    assert moving.manifest.state.optimizer_steps == alone.manifest.state.optimizer_steps == STEPS
    wanted = tensors(alone, ("param", "exp_avg", "exp_avg_sq"))
    found = tensors(moving, ("param", "exp_avg", "exp_avg_sq"))
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        if not key[1].endswith("attention.k.bias"):  # without RoPE their gradient is rounding
            assert float((found[key] - value).norm() / value.norm().clamp(min=torch.finfo().tiny)) <= 1e-5, key
