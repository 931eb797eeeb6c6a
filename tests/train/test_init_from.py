"""Where a stage's weights come from, and what it leaves alone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mmtrain.config.load import dump
from mmtrain.config.schema import Recipe, Upcycle, UpcyclePart
from mmtrain.parallel.box import Box, Piece
from mmtrain.run.comm import SingleProcess
from mmtrain.run.manifest import RunState
from mmtrain.run.saver import Saver
from tests.train import jobs, tasks
from tests.train.tiny import SPARSE, curve, last, model, tensors


class Chain(NamedTuple):
    """Runs that begin with the same dense parent."""

    parent: Recipe
    again: Recipe
    frozen: Recipe
    experts: Recipe
    refused: str
    log: str


@pytest.fixture(scope="module")
def chain(make: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """From a dense parent of two steps: a dense step, a partly frozen stage, a sparse one, one that is refused."""
    folder = tmp_path_factory.mktemp("chain")
    parent = make(folder / "parent", steps=2)
    later = {"init_from": parent.out, "seed": 5, "steps": 1}
    again = make(folder / "again", **later)
    frozen = make(folder / "frozen", **later | {"steps": 3, "trainable": ["connector.*", "*.mlp.*"]})
    # Balance and z have no part in language_loss, so coefficients may stay what they are.
    sparse = model(replace(SPARSE, every=2), SPARSE, replace(SPARSE, balance="bias"))
    parts = Upcycle(UpcyclePart(), UpcyclePart(), UpcyclePart())
    experts = make(folder / "experts", **later, model=sparse, upcycle=parts)
    unnamed = make(folder / "unnamed", **later, model=sparse, upcycle=replace(parts, connector=None, decoder=None))
    log = ""
    for recipe in (parent, again, frozen, experts):
        ended = jobs.run(folder, tasks.trained, recipe)
        assert ended.value == 0, ended.log
        log += ended.log
    return Chain(parent, again, frozen, experts, jobs.run(folder, tasks.trained, unnamed).value, log)


def test_the_log_says_what_was_loaded(chain: Chain) -> None:
    count = len(tensors(last(chain.parent)))
    assert f"weights from {chain.parent.out}" in chain.log and f"loaded: {count:4d} tensors" in chain.log


def test_a_run_that_goes_on_needs_its_beginning_no_more(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.again.out, tmp_path / "run")
    parent = Path(chain.parent.out)
    away = parent.rename(parent.with_name("away"))
    ended = jobs.run(tmp_path, tasks.trained, replace(chain.again, out=str(tmp_path / "run"), steps=2))
    away.rename(parent)
    assert ended.value == 0 and "going on after step 1" in ended.log and "weights from" not in ended.log, ended.log


def test_frozen_parameters_stay_to_the_bit(chain: Chain) -> None:
    before, after = tensors(last(chain.parent)), tensors(last(chain.frozen))
    assert before.keys() == after.keys()
    same = {name for (kind, name) in before if torch.equal(before[kind, name], after[kind, name])}
    learns = {name for _, name in before if name.startswith("connector.") or ".mlp." in name}
    assert same == {name for _, name in before} - learns
    assert set(last(chain.frozen).names("exp_avg")) == learns  # no optimizer state for what is frozen


def test_experts_compute_what_the_dense_parent_computes(chain: Chain) -> None:
    dense, sparse = curve(chain.again)[0], curve(chain.experts)[0]
    assert dense["loss_by_source"].keys() == sparse["loss_by_source"].keys()
    for source, loss in dense["loss_by_source"].items():
        assert sparse["loss_by_source"][source] == pytest.approx(loss, abs=1e-5)
    assert sparse["loss"] > sparse["language_loss"]  # the routers' losses came on top
    names = last(chain.experts).names()
    routers = [name for name in names if name.endswith("router.weight")]
    copies = [name for name in names if ".experts." in name]
    assert f"upcycled: {len(copies):4d} tensors" in chain.log and f"fresh: {len(routers):4d} tensors" in chain.log
    assert "decoder.blocks.*.mlp.router.weight  x2" in chain.log


def test_experts_that_no_one_asked_for_are_refused(chain: Chain) -> None:
    assert chain.refused.startswith(f"ConfigError: init_from {chain.parent.out} is dense where the recipe has experts")
    assert "in connector, decoder: name them" in chain.refused and "upcycle.connector.noise=0" in chain.refused


def test_a_checkpoint_that_shares_no_name_is_refused(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(tmp_path / "run", init_from=str(tmp_path / "other"))
    saver = Saver(tmp_path / "other", SingleProcess())
    stranger = Piece("transformer.wte", "param", (3,), Box((0,), (3,)), (0, 3), torch.ones(3), 0)
    saver.save(1, [stranger], RunState(0, dump(recipe), {}, "none"))
    saver.wait()
    ended = jobs.run(tmp_path, tasks.trained, recipe)
    assert ended.value.startswith("CheckpointError: init_from: none of the checkpoint's 1 tensors (transformer.wte)")
    assert ended.value.endswith("Is it the right checkpoint?")
