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
from mmtrain.sweep.spec import VARIANT, Choices, Range, Repeat, Sweep, read_sweep
from mmtrain.sweep.study import Study, Trial
from mmtrain.sweep.transfer import at_edge, best_point, carried_base, differences, horizon, sanity, unfinished
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
    decoder = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48}
    assert made.mup.base["decoder"] == decoder
    assert yaml.safe_load(out.read_text())["base"] == os.path.relpath(target, out.parent)
    told = "\n".join(lines)
    assert "transferred by width: optim.lr=0.004, mup.output=2" in told
    assert "not transferred: optim.clip" in told
    assert "flagged: data.global_batch: 8 -> 16 (batch: the best rate grows with it)" in told
    assert "flagged: mup.output=2 is at the edge of what was tried (0.5 to 2)" in told
    assert "optim.lr=0.002, optim.lr=0.004, optim.lr=0.008" in told
    assert "cost of tuning: 1.2e+04 FLOPs in 12 trials, of the target unknown, its data are not here" in told
    assert "flagged: horizon: 10 tokens in 2 steps -> 204,800 in 100 (the best rate moves with the tokens" in told
    assert "has not ended" not in told
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
    assert any(line.startswith("cost of tuning: 4e+03 FLOPs in 4 trials,") for line in lines)
    assert "flagged: the study has not ended: 0 trials run, 16 are to come" in lines


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
    (cost,) = (line for line in lines if line.startswith("cost of tuning"))
    assert ("in 1 trials (their parent's left out)," in cost) == bool(parent)


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
        ("optim.lr_multipliers.vision=0.1", "optim.lr_multipliers.vision: not set -> 0.1 (they are part of the tuned"),
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("optim.eps=1.0e-6", "optim.eps: 1e-08 -> 1e-06 (the best rate may move with it)"),
        ("parallel.precision=bf16", "parallel.precision: fp32 -> bf16 (rounding"),
        ("model.decoder.rope_theta=500", "model.decoder.rope_theta: 10000.0 -> 500.0 (only width is proved"),
        ("data.loss_weights.text_only=0.5", "data.loss_weights.text_only: 1.0 -> 0.5 (data"),
        ("data.sources={}", "data.sources.a.shards: nowhere -> not set (data"),
        ("model.decoder.num_kv_heads=1", "model.decoder.num_kv_heads: 2 -> 1 (narrower than the proxy"),
    ],
)
def test_what_else_changes_a_run_is_flagged(files, tmp_path, change, told):
    sweep, target = files
    assert any(line.startswith(f"flagged: {told}") for line in carry(sweep, target, [change], tmp_path / "x", None, []))


def test_how_a_run_is_done_is_no_difference():
    free = ["name=b", "out=c", "seed=7", "parallel.tensor=2", "log.every=1", "checkpoint.every=9", "data.micro_batch=2"]
    assert differences(load_text(RECIPE), load_text(RECIPE, free)) == ([], [])


def test_the_rates_and_multipliers_beside_which_values_were_found_are_carried(files, tmp_path):
    sweep, target = files
    other = tmp_path / "target.yaml"
    other.write_text(f"base: {target}\nmup: {{embedding: 8.0, init: 0.1, lr: {{vision: 0.01}}}}\n")
    lines = carry(sweep, other, [], tmp_path / "made.yaml", None, [])
    mup = load(tmp_path / "made.yaml").mup
    assert (mup.embedding, mup.init, mup.lr, mup.output) == (1.0, 1.0, {"vision": 1.0}, 2.0)
    assert "carried though not searched: mup.lr.vision=1.0" in lines


@pytest.mark.parametrize(
    "given",
    ["optim.lr=0.5", "optim={lr: 0.5}", "mup.base.decoder.hidden_size=32", "mup.embedding=2", "mup.lr.vision=2"],
)
def test_what_is_carried_cannot_be_given(files, tmp_path, given):
    sweep, target = files
    with pytest.raises(
        ConfigError, match=r"^(optim|mup)\.[a-z._]+: carried from the sweep, not given here; leave it out"
    ):
        carry(sweep, target, [given], tmp_path / "made.yaml", None, [])


def test_given_sections_reach_the_recipe_whole(files, tmp_path):
    sweep, target = files
    given = ["optim={clip: 0.5, warmup_steps: 3}", "optim.warmup_steps=4", "init_from=", "data.sources.b.shards=there"]
    carry(sweep, target, given, tmp_path / "made.yaml", None, [])
    made = load(tmp_path / "made.yaml")
    assert (made.optim.clip, made.optim.warmup_steps, made.optim.lr, made.init_from) == (0.5, 4, 0.004, "")
    assert sorted(made.data.sources) == ["a", "b"]


def test_a_target_with_a_base_of_its_own_is_refused_unless_it_is_the_proxys(files, tmp_path):
    sweep, target = files
    other = tmp_path / "target.yaml"
    other.write_text(f"base: {target}\nmup: {{base: {{decoder: {{hidden_size: 32}}}}}}\n")
    with pytest.raises(
        ConfigError, match=r"target.yaml names mup.base already, and decoder.hidden_size otherwise than"
    ):
        carry(sweep, other, [], tmp_path / "made.yaml", None, [])
    other.write_text(other.read_text().replace("32", "16"))
    carry(sweep, other, [], tmp_path / "made.yaml", None, [])
    assert load(tmp_path / "made.yaml").mup.base["decoder"]["hidden_size"] == 16


def test_no_file_is_lost_and_none_is_left_that_cannot_be_trained(files, tmp_path):
    sweep, target = files
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {target}\n")
    with pytest.raises(ConfigError, match=r"--out .*mine.yaml is the target itself; it would be lost"):
        carry(sweep, mine, [], mine, None, [])
    with pytest.raises(ConfigError, match=r"--out .*mine.yaml is there, and this tool did not write it; it would be"):
        carry(sweep, target, [], mine, None, [])
    assert mine.read_text() == f"base: {target}\n"
    made = tmp_path / "made.yaml"
    with pytest.raises(ConfigError, match=r"height 16 is not a multiple of model.vision.patch_size=5"):
        carry(sweep, target, ["model.vision.patch_size=5"], made, None, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]
    for _ in range(2):  # its own file it may write again
        carry(sweep, target, [], made, None, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.transfer.json", "made.yaml", "mine.yaml"]


def test_the_command_tells_a_mistake_in_one_line(files, tmp_path, capsys):
    sweep, target = files
    assert main([str(sweep.file), str(target), "--out", str(tmp_path / "x.yaml"), "--variant", "other"]) == 2
    assert "no finished trial of variant other; run the sweep first" in " ".join(capsys.readouterr().err.split())
    assert main([str(sweep.file), str(target), "--out", str(tmp_path / "x.yaml")]) == 0
    assert "origin:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "tokens", "told"),
    [
        (100, 9.5, None),
        (100, 8.0, "1,000 tokens in 100 steps -> 800 in 100"),
        (200, 5.0, "1,000 tokens in 100 steps -> 1,000 in 200"),
        (0, 10.0, "1,000 tokens in 100 steps -> 2 epochs"),
    ],
)
def test_another_horizon_is_flagged(steps, tokens, told):
    target = replace(load_text(RECIPE), steps=steps, epochs=0.0 if steps else 2.0)
    found = horizon({"tokens": 1000.0, "steps": 100}, target, tokens)
    assert (found and f"{found.proxy} -> {found.target}") == told


def test_depth_and_start_are_flagged_and_widths_are_not():
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


def test_a_pretrained_part_keeps_its_own_width_as_base():
    proxy = load_text(RECIPE)
    target = replace(proxy, model=replace(proxy.model, vision=replace(proxy.model.vision, pretrained="clip")))
    assert list(carried_base(proxy, target)) == ["connector", "decoder"]
    flagged = [difference.words() for difference in differences(proxy, target)[1]]
    assert flagged[0].startswith("init_from: none -> pretrained (no evidence")
    assert flagged[1].startswith("model.vision.pretrained: none -> clip (its base is its own width") and not flagged[2:]


def load_text(text: str, overrides=()):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text)
        return load(path, overrides)


def trial(number: int, lr: float, loss: float, seed: int = 0, state: str = "done") -> Trial:
    return Trial(number, state, {"optim.lr": lr, "seed": seed, VARIANT: ""}, loss, {"seed": seed})


def sweep_of(space, **changes) -> Sweep:
    return Sweep(Path("s"), "s", Path("r"), Path("o"), {"optim.lr": space}, **changes)


def test_the_best_point_is_the_best_mean_over_seeds_not_one_lucky_seed():
    trials = [trial(0, 0.1, 1.0), trial(1, 0.1, 3.0, 1), trial(2, 0.2, 1.5), trial(3, 0.2, 1.6, 1), trial(4, 0.4, 0.1)]
    best = best_point(sweep_of(Choices((0.1, 0.2, 0.4))), trials)
    assert best.params == {"optim.lr": 0.2, VARIANT: ""} and best.trials == (2, 3)
    assert best.loss == pytest.approx(1.55) and best.spread == pytest.approx(0.1)
    assert best.passed_over == ((4, 0.1),)


def test_a_point_that_diverged_with_any_seed_is_never_best():
    trials = [trial(0, 0.1, 0.5), trial(1, 0.1, math.inf, 1, "diverged"), trial(2, 0.2, 1.5), trial(3, 0.2, 1.6, 1)]
    for known in (trials, trials[:3]):  # repeated or not
        best = best_point(sweep_of(Choices((0.1, 0.2))), known)
        assert (best.params["optim.lr"], best.passed_over) == (0.2, ())


def test_a_lower_loss_with_fewer_seeds_is_told(files, tmp_path):
    _, target = files
    file = target.with_name("lucky.yaml")
    file.write_text(SWEEP.replace("OUT", str(tmp_path / "run")))
    study = Study(read_sweep(file))
    for loss in (1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0):  # the last is the first point's second seed
        study.finish(study.claim(), *outcome(loss))
    lines = carry(study.sweep, target, [], tmp_path / "made.yaml", None, [])
    assert "flagged: trial 1 has a lower loss, 0.5000, with fewer seeds; it may be luck: repeat it" in lines


@pytest.mark.parametrize(
    ("states", "repeat", "told"),
    [
        (["done", "pruned", "diverged"], None, ""),
        (["done", "done", "running", "waiting"], None, "1 trials run, 1 are to come"),
        (["done"], None, "0 trials run, 2 are to come"),
        (["done", "done", "done"], Repeat(2, (1, 2)), "0 trials run, 4 are to come"),
    ],
)
def test_what_is_to_come_of_a_study(states, repeat, told):
    trials = [trial(number, 0.1, math.nan if state != "done" else 1.0, 0, state) for number, state in enumerate(states)]
    assert unfinished(sweep_of(Range(0.1, 1.0), trials=3, repeat=repeat), trials) == told


def test_several_variants_need_a_name():
    with pytest.raises(ConfigError, match=r"has the variants a, b; say which one is the proxy"):
        best_point(sweep_of(Choices((0.1,)), variants={"a": (), "b": ()}), [])


@pytest.mark.parametrize(("lr", "edges"), [(1.05e-3, 1), (5e-3, 0), (0.0095, 1)])
def test_an_optimum_at_the_edge_of_a_range_is_told(lr, edges):
    space = sweep_of(Range(1e-3, 1e-2))
    assert len(at_edge(space, best_point(space, [trial(0, lr, 1.0)]))) == edges


def test_a_target_that_runs_by_epochs_has_no_step_law():
    first, *others = sanity(load_text(RECIPE), 1e-3, 1000.0, 0)
    assert first == "Step Law: needs the steps of the target, which runs by epochs"
    assert others == sanity(load_text(RECIPE), 1e-3, 1000.0, 5)[1:]
