"""Pretrained parts under muP, and sparse models out of dense public ones in one command."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmtrain.assemble import blueprint
from mmtrain.config.check import check_model, problems
from mmtrain.config.errors import ConfigError
from mmtrain.config.load import dump, load
from mmtrain.convert.export import export
from mmtrain.inference import open_inference
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.run.reader import open_weights
from tests.convert import families
from tests.convert.cases import SMALL, all_logits, import_decoder, text_batch

SCALED = ["mup.base.vision.hidden_size=12", "mup.base.vision.num_heads=2", "mup.base.vision.intermediate_size=20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save(families.random_twin(*families.DECODERS["llama3"]), tmp_path_factory.mktemp("hf"))


@pytest.fixture
def recipe(folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\nout: b\nsteps: 1\ndata: {sources: {a: {shards: c}}}\n")
    return lambda *overrides: load(path, [*SMALL, f"model.decoder.pretrained={folder}", *overrides])


def test_config_json_fills_what_the_recipe_leaves_out(recipe, folder) -> None:
    decoder = recipe().model.decoder
    twin = families.DECODERS["llama3"][1]
    assert (decoder.hidden_size, decoder.num_layers, decoder.num_kv_heads, decoder.head_dim) == (32, 2, 2, 12)
    assert (decoder.norm_eps, decoder.tied, decoder.vocab_size) == (twin.rms_norm_eps, False, families.VOCAB)
    scaling = decoder.rope_scaling
    assert (decoder.rope_theta, scaling.kind, scaling.factor, scaling.original_length) == (500.0, "llama3", 8.0, 32)
    assert recipe().data.tokenizer == str(folder)


def test_a_resolved_recipe_outlives_the_folder(recipe, tmp_path) -> None:
    whole = recipe()
    gone = replace(whole.model, decoder=replace(whole.model.decoder, pretrained=str(tmp_path / "gone")))
    (tmp_path / "dumped.yaml").write_text(dump(replace(whole, model=gone)))
    assert load(tmp_path / "dumped.yaml").model.decoder.hidden_size == 32
    with pytest.raises(ConfigError, match="gone: no such folder"):
        recipe(f"model.decoder.pretrained={tmp_path / 'gone'}")


def test_a_pretrained_part_keeps_its_own_base_and_its_attention_scale(recipe) -> None:
    chosen = recipe(*SCALED)
    check_model(chosen)
    model, registry = blueprint(chosen)
    plain = VisionLanguageModel(chosen.model)
    for ours, public in zip(model.decoder.blocks, plain.decoder.blocks, strict=True):
        assert ours.attention.scale == public.attention.scale == chosen.model.decoder.head_dim**-0.5
    assert model.vision.blocks[0].attention.scale != plain.vision.blocks[0].attention.scale
    ratios = {name.partition(".")[0]: set() for name in registry.entries}
    for name, entry in registry.entries.items():
        ratios[name.partition(".")[0]] |= {entry.m_in, entry.m_out}
    assert ratios["decoder"] == {1.0} and ratios["vision"] == {1.0, 2.0}


def test_base_widths_and_factors_that_would_change_it_are_refused(recipe) -> None:
    found = list(problems(recipe("mup.base.decoder.hidden_size=16", "mup.attention=0.5", "mup.output=2"), 1))
    assert (
        "mup.base.decoder.hidden_size=16: model.decoder is pretrained, so its base widths are its own (32); leave "
        "mup.base.decoder out" in found
    )
    for text in ("mup.attention=0.5", "mup.output=2"):
        assert any(line.startswith(f"{text} would change what the pretrained model.decoder computes") for line in found)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_public_dense_decoder_becomes_sparse_in_one_command(folder, noise, tmp_path, monkeypatch, capsys) -> None:
    dense = open_inference(import_decoder(monkeypatch, folder, tmp_path / "dense"))
    overrides = ("model.decoder.moe.num_experts=4", f"upcycle.decoder.noise={noise}")
    sparse = open_inference(import_decoder(monkeypatch, folder, tmp_path / "sparse", *overrides))
    said = capsys.readouterr().out.splitlines()[-1]
    mlps = 2 * 3 * 32 * 48
    total = sum(parameter.numel() for parameter in dense._model.parameters()) - 2 * 84 * 32  # rows that pad to 384
    routers = 2 * 4 * 32
    assert said.endswith(
        f": {total + 3 * mlps + routers:,} parameters, {total + mlps + routers:,} active for a token (dense: {total:,})"
    )
    batch = text_batch(families.tokens(2, 30))
    difference = (all_logits(sparse.forward, batch) - all_logits(dense.forward, batch)).abs().max()
    assert difference <= 1e-4 if noise == 0.0 else difference > 1e-2


MOE = "model.decoder.moe."
NARROW = [MOE + "num_experts=8", MOE + "top_k=4", MOE + "granularity=4", MOE + "routed_scale=4"]
SHARED = [MOE + "num_experts=6", MOE + "top_k=3", MOE + "granularity=4", MOE + "shared=1", MOE + "routed_scale=3"]


@pytest.mark.parametrize(
    ("overrides", "slices", "experts"), [(NARROW, 8, 8), (SHARED, 7, 6)], ids=["all slices routed", "one slice shared"]
)
def test_slices_of_a_public_dense_decoder_compute_what_it_computes(
    folder, overrides, slices, experts, tmp_path, monkeypatch, capsys
) -> None:
    """In one command; and so do they in the class that they leave for, where the factor lies in the weights."""
    dense = open_inference(import_decoder(monkeypatch, folder, tmp_path / "dense"))
    given = ("upcycle.decoder.noise=0", *overrides)
    sparse = open_inference(import_decoder(monkeypatch, folder, tmp_path / "sparse", *given))
    said = capsys.readouterr().out.splitlines()[-1]
    mlps, routers = 2 * 3 * 32 * 48, 2 * experts * 32
    total = sum(parameter.numel() for parameter in dense._model.parameters()) - 2 * 84 * 32  # rows that pad to 384
    assert said.endswith(
        f": {total - mlps + mlps * slices // 4 + routers:,} parameters, {total + routers:,} active for a token "
        f"(dense: {total:,})"
    )
    ids = families.tokens(2, 30)
    want = all_logits(dense.forward, text_batch(ids))
    assert (all_logits(sparse.forward, text_batch(ids)) - want).abs().max() <= 1e-4
    reader = open_weights(tmp_path / "sparse")
    if slices == experts:
        assert export(reader, tmp_path / "out", "decoder") == "MixtralForCausalLM"
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert (got - want).abs().max() <= 1e-4
    else:
        with pytest.raises(ConfigError, match="a shared expert beside routed ones has no public class here"):
            export(reader, tmp_path / "out", "decoder")


def test_experts_without_upcycle_are_refused(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"is dense where the recipe has experts in decoder: name them to copy"):
        import_decoder(monkeypatch, folder, tmp_path / "mm", "model.decoder.moe.num_experts=4")
