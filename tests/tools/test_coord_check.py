"""The coordinate check on a small model with experts in all three parts: muP passes, SP and every fault are caught."""

import json
from dataclasses import replace

import pytest

from mmtrain.config.schema import Connector, Data, Decoder, Model, Moe, Mup, Optim, Recipe, Vision
from tools.coord_check import check, examine, main
from tools.coord_model import FAULTS, flattened_lr, mup, train

MOE = Moe(num_experts=4, top_k=2)
MODEL = Model(
    vision=Vision(
        image_size=(16, 16), patch_size=4, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, moe=MOE
    ),
    connector=Connector(kind="avg_pool", num_tokens=4, hidden_size=32, depth=1, moe=MOE),
    decoder=Decoder(
        vocab_size=128,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        moe=MOE,
    ),
)
RECIPE = Recipe(name="coord", out="nowhere", model=MODEL, data=Data(micro_batch=4), optim=Optim(lr=1.5e-3), mup=Mup())
FEW = (1, 4)
"""Widths at which a fault is planted: enough to see it, and quick."""


@pytest.fixture(scope="module")
def setups():
    return [mup(RECIPE, MODEL, factor, "head_size") for factor in FEW]


@pytest.mark.timeout(600)
def test_mup_passes_and_sp_fails_on_a_vlm_with_experts_in_all_parts():
    (right, wrong), problems = check(RECIPE, (1, 2, 4, 8), 3, 8, "head_size", ())
    assert problems == []
    assert {verdict.part for verdict in right.verdicts} == {"vision", "connector", "decoder"}
    kinds = {"attention logits", "router logits", "logits", "block", "mlp", "embedding", "hidden", "attention"}
    assert kinds <= {verdict.kind for verdict in right.verdicts}
    assert sum(bool(verdict.problem) for verdict in wrong.verdicts) > len(wrong.verdicts) / 2 and wrong.formulas


CAUGHT = {
    "flattened_lr": ("grows", "block decoder.blocks.0"),
    "hidden_router": ("grows", "router logits decoder.blocks.0.mlp.router"),
    "scaled_embedding_lr": ("shrinks", "embedding decoder.embedding"),
    "plain_output": ("grows", "logits decoder.head"),
    "plain_attention": ("factor", "the factor on q.k is"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows_where_it_was_planted(setups, fault):
    how, where = CAUGHT[fault.__name__]
    found = examine(fault.__name__, [fault(made) for made in setups], 2, 8)
    if how == "factor":
        assert any(where in problem for problem in found.formulas)
        return
    right = next(verdict for verdict in examine("muP", setups, 2, 8).verdicts if verdict.probe == where)
    (verdict,) = [verdict for verdict in found.verdicts if verdict.probe == where]
    away, noise = verdict.fit.slope - right.fit.slope, verdict.fit.error + right.fit.error
    assert not right.problem and verdict.problem.startswith(how)
    assert away > 2 * noise if how == "grows" else away < -2 * noise


def test_the_cross_attention_s_multiplier_belongs_to_its_factor():
    connector = Connector(kind="attention_pool", num_tokens=4, hidden_size=32, num_heads=2)
    recipe = replace(RECIPE, model=replace(MODEL, connector=connector), mup=Mup(cross_attention=2.0, attention=0.5))
    made = mup(recipe, recipe.model, 2, "head_size")
    assert train(made, 0, 0)[1] == []
    (wrong,) = train(made._replace(scales=replace(made.scales, attention_connector=0.125)), 0, 0)[1]
    assert wrong == "connector.attention: the factor on q.k is 0.125, not 2 x sqrt(16) / 32 = 0.25"


def flat_but_for_plain_rates(made, _seed, _steps):
    """What training changed: nothing that depends on width, unless no rate does."""
    plain = all(entry.lr_mult == 1.0 for entry in made.registry.entries.values())
    grown = made.recipe.model.decoder.hidden_size / made.base.decoder.hidden_size
    return {"block vision.blocks.0": grown if plain else 1.0}, []


def test_a_check_that_tells_nothing_apart_fails(monkeypatch):
    monkeypatch.setattr("tools.coord_check.train", lambda *_: ({"block vision.blocks.0": 1.0}, []))
    said = check(RECIPE, (1, 2, 4, 8), 3, 8, "head_size", [flattened_lr])[1]
    assert said == [
        "SP passes too: these settings cannot tell right from wrong; take a higher optim.lr",
        "flattened_lr was not caught",
    ]
    monkeypatch.setattr("tools.coord_check.train", flat_but_for_plain_rates)
    assert check(RECIPE, (1, 2, 4, 8), 3, 8, "head_size", [flattened_lr])[1] == []
    assert check(RECIPE, (1, 2, 4, 8), 3, 8, "head_size", FAULTS[1:2])[1] == ["hidden_router was not caught"]


def test_exit_code_0_means_that_it_passed(tmp_path, monkeypatch, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE_FILE)
    monkeypatch.setattr("tools.coord_check.train", flat_but_for_plain_rates)
    assert main([str(file), "--out", str(tmp_path)]) == 0
    assert "coordinate check: pass" in capsys.readouterr().out
    assert json.loads((tmp_path / "coord_check.json").read_text())["pass"] is True


RECIPE_FILE = """
name: coord
out: nowhere
steps: 10
data: {tokenizer: nowhere.json, sources: {a: {shards: nowhere}}}
model:
  vision: {image_size: [8, 8], patch_size: 4, hidden_size: 8, num_layers: 1, num_heads: 2, intermediate_size: 8,
           moe: {num_experts: 2}}
  connector: {kind: avg_pool, num_tokens: 4, hidden_size: 8, moe: {num_experts: 2}}
  decoder: {vocab_size: 16, hidden_size: 8, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 4,
            intermediate_size: 8, moe: {num_experts: 2}}
"""


def test_the_command_writes_slopes_and_a_plot_and_fails_on_what_proves_nothing(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE_FILE)
    code = main([str(file), "--widths", "1", "2", "--seeds", "2", "--steps", "2", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert code == 1 and "coordinate check: FAIL" in told
    for reason in ("at least 4 of them over a factor of 8", "2 seeds: at least 3", "2 steps: at least 8"):
        assert reason in " ".join(told.split())
    report = json.loads((tmp_path / "out" / "coord_check.json").read_text())
    assert report["pass"] is False and report["findings"].keys() == {"muP", "SP"}
    probe = report["findings"]["muP"]["probes"]["block decoder.blocks.0"]
    assert probe["fit"].keys() == {"slope", "error", "r2", "count"} and probe["part"] == "decoder"
    assert probe["change"].keys() == {"8", "16"} and all(0 < change < 10 for change in probe["change"].values())
    assert report["command"].startswith("python -m tools.coord_check ") and "--seeds 2" in report["command"]
    assert report["packs"] == 1 and report["commit"] and report["hardware"]["cores"] >= 1
    assert (tmp_path / "out" / "coord_check.png").read_bytes().startswith(b"\x89PNG")


def test_SP_and_faults_run_with_the_settings_of_muP(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE_FILE)
    main([str(file), "--widths", "1", "2", "--seeds", "4", "--steps", "1", "--faults", "--out", str(tmp_path)])
    findings = json.loads((tmp_path / "coord_check.json").read_text())["findings"]
    counts = {name: found["probes"]["block decoder.blocks.0"]["fit"]["count"] for name, found in findings.items()}
    assert counts == dict.fromkeys(["muP", "SP", *(fault.__name__ for fault in FAULTS)], 2 * 4)


def test_a_width_of_nothing_is_refused(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE_FILE)
    assert main([str(file), "--widths", "0", "1"]) == 2
    assert "--widths, --seeds and --steps are at least 1" in capsys.readouterr().err
