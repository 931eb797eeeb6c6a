import pytest

from mmtrain.config.schema import Mup, Optim, Recipe
from mmtrain.mup.shapes import read_base_shapes
from tests.mup.small import BASE, config
from tools.mup_table import COLUMNS, main, rows

RECIPE = """
name: table
out: nowhere
steps: 10
data: {tokenizer: nowhere.json, sources: {a: {shards: nowhere}}}
model:
  vision: {image_size: [28, 28], patch_size: 7, hidden_size: 32, num_layers: 2, num_heads: 2, intermediate_size: 128}
  connector: {kind: avg_pool, num_tokens: 4}
  decoder: {vocab_size: 200, hidden_size: 128, num_layers: 2, num_heads: 8, num_kv_heads: 2, head_dim: 8,
            intermediate_size: 144, tied: true}
mup: {base: {vision: {hidden_size: 16}, decoder: {hidden_size: 32}}}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def table(**changes) -> dict[str, dict[str, str]]:
    recipe = Recipe(name="t", out="nowhere", model=config(experts=4), **changes)
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows(recipe)}


def test_a_row_shows_the_numbers_that_the_optimizer_gets():
    shown = table(mup=Mup(base=BASE, output=2.0), optim=Optim(lr=0.01, weight_decay=0.1, lr_multipliers={"*.up": 3.0}))
    q = shown["vision.blocks.*.attention.q.weight"]
    assert list(q.values())[1:] == [
        "2",
        "matrix",
        "32/16",
        "32/16",
        "2",
        "2",
        "0.1768",
        "0.005",
        "0.2",
        "5e-09",
        "q.k 0.1768",
    ]
    assert shown["vision.blocks.*.mlp.experts.up"]["lr"] == "0.015"
    assert shown["decoder.head.weight"]["forward"] == "logits 0.5"
    assert shown["decoder.norm.weight"]["init std"] == "ones"
    assert shown["decoder.norm.weight"]["decay"] == "0"
    assert sum(int(row["n"]) for row in shown.values()) > len(shown)


def test_frozen_parameters_say_so():
    shown = table(trainable=["connector.*"])
    assert shown["decoder.norm.weight"]["lr"] == "frozen"
    assert shown["connector.positions"]["lr"] == "0.001"


def test_the_command_prints_whole_rows_and_writes_the_base_shapes(recipe_file, tmp_path, capsys):
    assert main([str(recipe_file), "optim.lr=0.5", "--bsh", str(tmp_path / "base.bsh")]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "decoder.embedding.weight" in line)
    assert row.split()[1:3] == ["1", "input"]
    assert row.split()[-3:] == ["1,", "logits", "0.25"]
    assert next(line for line in lines if "decoder.blocks.*.attention.q.weight" in line).split()[8] == "0.125"
    assert read_base_shapes(tmp_path / "base.bsh")["decoder.embedding.weight"] == (None, 32)


def test_a_mistake_is_one_line_and_exit_code_2(recipe_file, capsys):
    assert main([str(recipe_file), "mup.base.vision.hidden_size=15"]) == 2
    message = capsys.readouterr().err
    assert "mup.base.vision: hidden_size 15 is no multiple of num_heads 2; name both in mup.base.vision" in message
    assert "Traceback" not in message
