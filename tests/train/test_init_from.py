"""Where a stage's weights come from, and what it leaves alone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mmtrain.assemble import blueprint
from mmtrain.config.errors import ConfigError
from mmtrain.config.load import dump
from mmtrain.config.schema import Connector, Mup, Recipe, Upcycle, UpcyclePart
from mmtrain.parallel.box import Box, Piece
from mmtrain.run.comm import SingleProcess
from mmtrain.run.manifest import RunState
from mmtrain.run.saver import Saver, write_whole
from mmtrain.start import write_start
from mmtrain.weights import Weights, stored_shapes
from tests.data.inputs import tokenizer
from tests.train import jobs, tasks, tiny
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


HALF = {"decoder": {"hidden_size": 16, "head_dim": 4}}
POOLED = Connector(kind="attention_pool", num_tokens=4, hidden_size=16, num_heads=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A parent in SP, with attention in all three parts."""
    folder = tmp_path_factory.mktemp("plain")
    pooled = tiny.recipe(folder, folder / "run", tokenizer(), mup=Mup(), model=replace(model(), connector=POOLED))
    write_start(pooled, tokenizer(), folder / "run")
    return pooled


def weights(child: Recipe) -> Weights:
    return Weights(child, blueprint(child)[1], SingleProcess())


@pytest.mark.parametrize(
    ("mup", "told"),
    [
        ({"base": HALF}, "attention of decoder 0.3536 there, 0.25 here; output of decoder 1 there, 0.5 here"),
        ({"base": {"vision": {"hidden_size": 8}}}, "attention of vision 0.3536 there, 0.25 here"),
        ({"base": {"connector": {"num_heads": 1}}}, "attention of connector 0.3536 there, 0.5 here"),
        ({"embedding": 4.0}, "embedding of decoder 1 there, 4 here"),
        ({"cross_attention": 2.0}, "attention of connector 0.3536 there, 0.7071 here"),
    ],
)
def test_weights_that_would_compute_another_function_are_refused(plain: Recipe, mup: dict, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        weights(replace(plain, init_from=plain.out, mup=Mup(**mup)))
    start = f"init_from {plain.out} was trained with other factors in its forward ({told}): the same weights would"
    assert str(refused.value).startswith(start) and "leave it out of mup.base" in str(refused.value)


def test_factors_that_no_loaded_weight_meets_may_differ(plain: Recipe, tmp_path: Path) -> None:
    # rates, fresh routers and a base that changes no factor are the child's own, and so is a part that starts anew
    widths = {"decoder": {"intermediate_size": 24}}
    tuned = Mup(base=widths, init=0.5, router=2.0, lr={"decoder": 0.1})
    assert weights(replace(plain, init_from=plain.out, mup=tuned)).report
    towers = replace(plain, init_from=str(tmp_path / "towers"), mup=Mup(base=HALF, embedding=4.0, output=3.0))
    source = weights(replace(plain, init_from=plain.out))
    shapes = {name: shape for name, shape in stored_shapes(blueprint(plain)[1]).items() if name.startswith("vision.")}
    vision = ((name, source.make(name, Box.whole(shape))) for name, shape in shapes.items())
    write_whole(tmp_path / "towers", 1, vision, RunState(0, dump(plain), {}, "none"), {})
    assert weights(towers).report
