"""From a study to a target's recipe: what is carried, what is refused, what is written."""

import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmtrain.config.errors import ConfigError
from mmtrain.config.load import load
from mmtrain.mup.laws import mm1_lr, mm1_weight_decay, step_law_batch, step_law_lr
from mmtrain.sweep.spec import VARIANT, Choices, Range, Sweep, read_sweep
from mmtrain.sweep.study import Study, Trial
from mmtrain.sweep.transfer import at_edge, best_point, differences
from tests.sweep.test_study import outcome
from tools.transfer import carry, main

RECIPE = """
name: small
out: nowhere
steps: 10
data: {tokenizer: nowhere.json, sequence_length: 128, sources: {a: {shards: nowhere}}}
model:
  vision: {image_size: [16, 16], patch_size: 8, hidden_size: 16, num_layers: 2, num_heads: 2, intermediate_size: 32,
           moe: {num_experts: 4}}
  connector: {kind: avg_pool, num_tokens: 4, hidden_size: 16}
  decoder: {vocab_size: 64, hidden_size: 16, num_layers: 2, num_heads: 2, num_kv_heads: 2, head_dim: 8,
            intermediate_size: 48}
eval: {every: 5, sources: {held: {shards: nowhere}}}
"""
WIDE = """
base: recipe.yaml
name: wide
steps: 100
data: {global_batch: 16}
model:
  vision: {hidden_size: 64, num_heads: 8, intermediate_size: 128}
  connector: {hidden_size: 64}
  decoder: {hidden_size: 64, num_heads: 8, num_kv_heads: 8, intermediate_size: 192}
"""
SWEEP = """
name: s
recipe: recipe.yaml
out: OUT
sampler: grid
search:
  seed: {choices: [0, 1]}
  optim.lr: {choices: [0.001, 0.004, 0.016]}
  mup.output: {choices: [0.5, 2.0]}
  optim.clip: {choices: [1.0]}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(sweep whose best point is lr 0.004 with output 2.0, target recipe)."""
    folder = tmp_path_factory.mktemp("transfer")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "wide.yaml").write_text(WIDE)
    (folder / "sweep.yaml").write_text(SWEEP.replace("OUT", str(folder / "run")))
    sweep = read_sweep(folder / "sweep.yaml")
    study = Study(sweep)
    while (claim := study.claim()) is not None:
        point = claim.params
        loss = abs(math.log(point["optim.lr"] / 0.004)) - 0.1 * point["mup.output"] + 0.01 * point["seed"]
        study.finish(claim, *outcome(loss))
    return sweep, folder / "wide.yaml"


def test_the_best_values_reach_a_runnable_recipe_with_their_base_and_origin(files, tmp_path):
    sweep, target = files
    out = tmp_path / "made" / "recipe.yaml"
    lines = carry(sweep, target, ["init_from=somewhere", "seed=5"], out, None, [])
    made = load(out)
    assert (made.optim.lr, made.mup.output, made.seed, made.init_from, made.steps) == (0.004, 2.0, 5, "somewhere", 100)
    assert made.model == load(target).model and made.optim.clip == load(target).optim.clip
    assert made.mup.base["decoder"] == {
        "hidden_size": 16,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
    }
    assert yaml.safe_load(out.read_text())["base"] == os.path.relpath(target, out.parent)
    told = "\n".join(lines)
    assert "transferred by width: optim.lr=0.004, mup.output=2" in told
    assert "not transferred: optim.clip" in told
    assert "flagged: data.global_batch: 8 -> 16 (batch: the best rate grows with it)" in told
    assert "flagged: mup.output=2 is at the edge of what was tried (0.5 to 2)" in told
    assert "optim.lr=0.002, optim.lr=0.004, optim.lr=0.008" in told
    assert "cost of tuning: 1.2e+04 FLOPs; of the target unknown, its data are not here" in told
    assert all(f"# {line}\n" in out.read_text() for line in lines[:3])
    origin = json.loads(out.with_suffix(".transfer.json").read_text())
    assert origin["values"] == {"optim.lr": 0.004, "mup.output": 2.0} and len(origin["trials"]) == 2


def test_the_cost_is_that_of_the_proxys_own_trials_that_ended(files, tmp_path):
    _, target = files
    file = target.with_name("two.yaml")
    file.write_text(SWEEP.replace("OUT", str(tmp_path / "run")) + "variants: {narrow: [], other: [steps=9]}\n")
    sweep = read_sweep(file)
    study = Study(sweep)
    for _ in range(8):  # of 24: two points of both seeds, no more
        claim = study.claim()
        study.finish(claim, *outcome(1.0))
    lines = carry(sweep, target, [], tmp_path / "made.yaml", "narrow", [])
    assert any(line.startswith("cost of tuning: 4e+03 FLOPs;") for line in lines)


@pytest.mark.parametrize(("parent", "flagged"), [("", 1), ("parent: {recipe: recipe.yaml}\n", 0)])
def test_a_proxy_with_a_parent_started_from_trained_weights_as_its_target_does(files, tmp_path, parent, flagged):
    _, target = files
    file = target.with_name("grown.yaml")
    file.write_text(SWEEP.replace("OUT", str(tmp_path / "run")) + parent)
    sweep = read_sweep(file)
    study = Study(sweep)
    study.finish(study.claim(), *outcome(1.0))
    change = ["requires_pretrained=true", "init_from=somewhere"]
    lines = carry(sweep, target, change, tmp_path / "made.yaml", None, [])
    assert sum(line.startswith("flagged: init_from") for line in lines) == flagged


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            "model.vision.moe.num_experts=8",
            "model.vision.moe.num_experts: 4 -> 8 (values do not transfer across the sh",
        ),
        ("model.vision.moe.top_k=1", "model.vision.moe.top_k: 2 -> 1 (routing must be the same)"),
        ("model.vision.intermediate_size=256", "(values do not transfer across expert granularity"),
        ("model.connector.kind=attention_pool", "model.connector.kind: avg_pool -> attention_pool"),
        ("model.decoder.tied=true", "model.decoder.tied: False -> True (a tied head is another network)"),
        ("optim.beta2=0.9", "optim.beta2: 0.95 -> 0.9 (the best rate moves with them)"),
    ],
)
def test_what_values_do_not_survive_is_refused_and_can_be_accepted(files, tmp_path, change, told):
    sweep, target = files
    out = tmp_path / "made.yaml"
    with pytest.raises(ConfigError) as error:
        carry(sweep, target, [change], out, None, [])
    assert told in str(error.value) and "or let a key pass with --accept KEY" in str(error.value)
    assert not out.exists()
    key = "model.vision: intermediate_size / hidden_size" if "intermediate" in change else change.partition("=")[0]
    assert any(line.startswith(f"flagged: {key}") for line in carry(sweep, target, [change], out, None, [key]))


def test_the_command_tells_a_mistake_in_one_line(files, tmp_path, capsys):
    sweep, target = files
    assert main([str(sweep.file), str(target), "--out", str(tmp_path / "x.yaml"), "--variant", "other"]) == 2
    assert "no finished trial of variant other; run the sweep first" in " ".join(capsys.readouterr().err.split())
    assert main([str(sweep.file), str(target), "--out", str(tmp_path / "x.yaml")]) == 0
    assert "origin:" in capsys.readouterr().out


def test_depth_horizon_and_start_are_flagged_and_widths_are_not():
    proxy = load_text(RECIPE)
    target = replace(
        proxy,
        requires_pretrained=True,
        model=replace(proxy.model, decoder=replace(proxy.model.decoder, num_layers=4, hidden_size=32, head_dim=16)),
    )
    refused, flagged = differences(proxy, target)
    keys = [difference.key for difference in flagged]
    assert "model.decoder.num_layers" in keys and "init_from" in keys
    assert not any(key.rpartition(".")[2] == "hidden_size" or key.endswith("head_dim") for key in keys)
    assert [difference.key for difference in refused] == []


def load_text(text: str):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text)
        return load(path)


def trial(number: int, lr: float, loss: float, seed: int = 0, state: str = "done") -> Trial:
    return Trial(number, state, {"optim.lr": lr, "seed": seed, VARIANT: ""}, loss, {"seed": seed})


def sweep_of(space, **changes) -> Sweep:
    return Sweep(Path("s"), "s", Path("r"), Path("o"), {"optim.lr": space}, **changes)


def test_the_best_point_is_the_best_mean_over_seeds_not_one_lucky_seed():
    trials = [trial(0, 0.1, 1.0), trial(1, 0.1, 3.0, 1), trial(2, 0.2, 1.5), trial(3, 0.2, 1.6, 1), trial(4, 0.4, 0.1)]
    best = best_point(sweep_of(Choices((0.1, 0.2, 0.4))), trials)
    assert best.params == {"optim.lr": 0.2, VARIANT: ""} and best.trials == (2, 3)
    assert best.loss == pytest.approx(1.55) and best.spread == pytest.approx(0.1)


def test_a_point_that_diverged_with_any_seed_is_never_best():
    trials = [trial(0, 0.1, 0.5), trial(1, 0.1, math.inf, 1, "diverged"), trial(2, 0.2, 1.5), trial(3, 0.2, 1.6, 1)]
    assert best_point(sweep_of(Choices((0.1, 0.2))), trials).params["optim.lr"] == 0.2


def test_several_variants_need_a_name():
    with pytest.raises(ConfigError, match=r"has the variants a, b; say which one is the proxy"):
        best_point(sweep_of(Choices((0.1,)), variants={"a": (), "b": ()}), [])


@pytest.mark.parametrize(("lr", "edges"), [(1.05e-3, 1), (5e-3, 0), (0.0095, 1)])
def test_an_optimum_at_the_edge_of_a_range_is_told(lr, edges):
    space = sweep_of(Range(1e-3, 1e-2))
    assert len(at_edge(space, best_point(space, [trial(0, lr, 1.0)]))) == edges


def test_laws_give_the_papers_own_examples():
    # MM1, section 3.3: 30B parameters -> 2.2e-5; its decay is a tenth of the rate.
    assert mm1_lr(30e9) == pytest.approx(2.2e-5, rel=0.02) and mm1_weight_decay(2e-5) == pytest.approx(2e-6)
    # Step Law grows with data and shrinks with size by its exponents.
    assert step_law_lr(2e9, 1e11) / step_law_lr(1e9, 1e11) == pytest.approx(2**-0.713)
    assert step_law_lr(1e9, 2e11) / step_law_lr(1e9, 1e11) == pytest.approx(2**0.307)
    assert step_law_batch(2e11) / step_law_batch(1e11) == pytest.approx(2**0.571)
