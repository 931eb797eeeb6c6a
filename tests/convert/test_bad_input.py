"""Folders that cannot be used: one clear line each, before anything is written."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from mmtrain.config.errors import CheckpointError, ConfigError, DataError, UserError
from tests.convert import families
from tests.convert.cases import SMALL, convert, import_decoder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A small Llama in three shards."""
    twin = families.random_twin(*families.DECODERS["llama"])
    return families.save(twin, tmp_path_factory.mktemp("sound"), shard="60KB")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in sound.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def refused(monkeypatch, folder: Path, kind: type[UserError], *overrides: str) -> str:
    """The one line of the error; no checkpoint is left."""
    out = folder.parent / "mm"
    with pytest.raises(kind) as caught:
        import_decoder(monkeypatch, folder, out, *overrides)
    assert not list(out.glob("step_????????"))
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text
    return text


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, **values: object) -> None:
    """Change config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def whole(folder: Path, change) -> None:
    """One file instead of the shards, with the tensors that `change` makes of them."""
    tensors = {name: value for path in shards(folder) for name, value in load_file(path).items()}
    for path in (*shards(folder), folder / "model.safetensors.index.json"):
        path.unlink()
    save_file(change(tensors), folder / "model.safetensors")


def test_a_missing_shard(folder, monkeypatch):
    count = len(shards(folder))
    shards(folder)[1].unlink()
    text = refused(monkeypatch, folder, CheckpointError)
    assert text == f"{folder}: 1 of {count} shards are missing: model-00002-of-0000{count}.safetensors. Get them too."


def test_a_shard_cut_short(folder, monkeypatch):
    path = shards(folder)[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    text = refused(monkeypatch, folder, CheckpointError)
    assert text == f"{path} is cut short: it has {size - 100:,} bytes, its header says {size:,}. Get the file anew"
    path.write_bytes(struct.pack("<Q", 10**6) + b"{}")
    assert "is no safetensors file, or cut short inside its header" in refused(monkeypatch, folder, CheckpointError)
    path.write_bytes(struct.pack("<Q", 4) + b"nope")
    assert "its header is not JSON" in refused(monkeypatch, folder, CheckpointError)


def test_an_index_that_promises_more_than_the_shards_hold(folder, monkeypatch):
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.ghost.weight"] = shards(folder)[0].name
    index.write_text(json.dumps(values))
    assert "lacks model.ghost.weight, which the index says it holds" in refused(monkeypatch, folder, CheckpointError)
    index.write_text("[]")
    assert "not the index of a sharded checkpoint" in refused(monkeypatch, folder, CheckpointError)


def test_quantised_weights(folder, monkeypatch):
    name = "model.layers.1.mlp.up_proj.weight"
    whole(folder, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    text = refused(monkeypatch, folder, CheckpointError)
    assert f"1 tensors are of a type that holds no plain weights ({name} is I8; F32, F16, BF16, F64 do)" in text


def test_tensors_that_map_to_nothing_and_weights_without_tensors(folder, monkeypatch):
    whole(folder, lambda tensors: tensors | {"model.layers.0.adapter.weight": torch.ones(3)})
    text = refused(monkeypatch, folder, CheckpointError)
    assert "1 of its tensors are none that mmtrain knows: model.layers.0.adapter.weight. They would be lost" in text
    edit(folder, num_hidden_layers=3)
    text = refused(monkeypatch, folder, CheckpointError)
    assert "9 tensors that its config.json asks for are not in its files: model.layers.2.input_layernorm.weight" in text


def test_a_config_of_other_weights(folder, monkeypatch):
    edit(folder, intermediate_size=40)
    text = refused(monkeypatch, folder, CheckpointError)
    assert "6 shapes do not fit: decoder.blocks.0.mlp.up.weight is [40, 32], " in text and "is [48, 32]" in text


def test_another_architecture(folder, monkeypatch):
    edit(folder, model_type="gpt2")
    text = refused(monkeypatch, folder, ConfigError)
    assert "model_type 'gpt2' is none that model.decoder can be read from; there are llama, mistral, qwen2" in text
    edit(folder, model_type="llama", attention_bias=True, hidden_act="gelu", rope_scaling={"rope_type": "yarn"})
    edit(folder, rope_parameters=None)
    text = refused(monkeypatch, folder, ConfigError)
    assert "hidden_act is 'gelu', not 'silu'; attention_bias is true, which puts a bias on o_proj; " in text
    assert "rope_type 'yarn' is none of default, linear, llama3; mmtrain has no such layer" in text


def test_a_recipe_that_disagrees_lists_every_difference(folder, monkeypatch):
    overrides = ("model.decoder.num_heads=8", "model.decoder.rope_theta=5", "model.decoder.vocab_size=299")
    text = refused(monkeypatch, folder, ConfigError, *overrides)
    for said in (
        "disagrees with the recipe: ",
        "model.decoder.num_heads=8, there it is 4; ",
        "model.decoder.rope_theta=5.0, there it is 10000.0; ",
        "model.decoder.vocab_size=299, there are 300; it can only grow",
    ):
        assert said in text
    assert import_decoder(monkeypatch, folder, folder.parent / "mm", "model.decoder.num_heads=4").is_dir()


def test_a_missing_tokenizer(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file; " in refused(monkeypatch, folder, DataError)


def test_folders_that_are_none(folder, monkeypatch):
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(monkeypatch, folder, ConfigError)
    (folder / "config.json").write_text("{}")
    assert "says no model_type" in refused(monkeypatch, folder, ConfigError)
    (folder / "config.json").unlink()
    assert "holds no config.json, so it is no Hugging Face checkpoint" in refused(monkeypatch, folder, ConfigError)
    assert "no such folder" in refused(monkeypatch, folder / "nowhere", ConfigError)
    with pytest.raises(ConfigError, match="no folder to convert: give --vision, --decoder or --vlm"):
        convert(monkeypatch, "hf-to-mm", "--out", folder / "mm")


def test_no_weights(folder, monkeypatch):
    for path in (*shards(folder), folder / "model.safetensors.index.json"):
        path.unlink()
    assert "holds no weights: none of model.safetensors.index.json" in refused(monkeypatch, folder, CheckpointError)


class Payload:
    """What a hostile pickle holds."""

    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_with_more_than_tensors_is_not_run(folder, monkeypatch, capsys):
    tensors = {name: value for path in shards(folder) for name, value in load_file(path).items()}
    for path in (*shards(folder), folder / "model.safetensors.index.json"):
        path.unlink()
    torch.save(tensors | {"bomb": Payload()}, folder / "pytorch_model.bin")
    text = refused(monkeypatch, folder, CheckpointError)
    assert "is a pickle that holds more than tensors, and loading it could run anything" in text
    assert "never be printed" not in capsys.readouterr().out
    (folder / "pytorch_model.bin").write_bytes(b"cut")
    assert "pytorch_model.bin" in refused(monkeypatch, folder, CheckpointError)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_bin_file_of_tensors_reads_like_safetensors(sound, folder, monkeypatch, old):
    from mmtrain.run.reader import open_weights

    tensors = {name: value for path in shards(folder) for name, value in load_file(path).items()}
    for path in (*shards(folder), folder / "model.safetensors.index.json"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    first = open_weights(import_decoder(monkeypatch, folder, folder.parent / "bin"))
    second = open_weights(import_decoder(monkeypatch, sound, folder.parent / "safe"))
    assert all(torch.equal(first.read(name), second.read(name)) for name in second.names())


def test_added_tokens_get_the_mean_of_the_rows(folder, monkeypatch):
    from mmtrain.run.reader import open_weights

    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    del values["model"]["vocab"]["<image>"]
    values["model"]["vocab"]["<extra_299>"] = families.IMAGE_ID
    file.write_text(json.dumps(values))
    reader = open_weights(import_decoder(monkeypatch, folder, folder.parent / "mm", "data.chat_template=chatml"))
    assert AutoConfig.from_pretrained(folder).vocab_size == families.VOCAB
    theirs = {name: value for path in shards(folder) for name, value in load_file(path).items()}
    for ours, name in (
        ("decoder.embedding.weight", "model.embed_tokens.weight"),
        ("decoder.head.weight", "lm_head.weight"),
    ):
        rows = reader.read(ours)
        assert rows.shape[0] == families.VOCAB + 3  # <image>, <|im_start|>, <|im_end|>
        assert torch.equal(rows[: families.VOCAB], theirs[name])
        assert torch.equal(rows[families.VOCAB :], theirs[name].double().mean(0).float().expand(3, -1))


def test_packs_longer_than_the_sliding_window_are_refused(tmp_path, monkeypatch):
    from mmtrain.config.check import check
    from mmtrain.config.load import load

    twin = families.random_twin(*families.DECODERS["mistral"])
    folder = families.save(twin, tmp_path / "hf")
    (tmp_path / "recipe.yaml").write_text("name: a\nout: b\nsteps: 1\ndata: {sources: {a: {shards: c}}}\n")
    recipe = load(tmp_path / "recipe.yaml", [*SMALL, f"model.decoder.pretrained={folder}"])
    with pytest.raises(
        ConfigError, match=r"data.sequence_length=2048 is longer than the 128 positions that the decoder"
    ):
        check(recipe, 1)
    check(load(tmp_path / "recipe.yaml", [*SMALL, f"model.decoder.pretrained={folder}", "data.sequence_length=128"]), 1)
