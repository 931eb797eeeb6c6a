"""Recipe files, inheritance, overrides, and the words of every mistake in them."""

import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmtrain.config.errors import ConfigError
from mmtrain.config.load import dump, load, load_with_origins, show, without_launcher_flags
from mmtrain.config.schema import Eval, Matching, Source, Upcycle, UpcyclePart
from tests.config.sample import RECIPE, changed

GOOD = """
name: good
out: runs/good
data: {tokenizer: t.json, sources: {a: {shards: data/a}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_a_file_gives_its_values_and_the_schema_the_rest(folder):
    recipe = load("good.yaml")
    assert (recipe.name, recipe.data.sources) == ("good", {"a": Source("data/a")})
    assert recipe.optim.lr == 1e-3


def test_bases_apply_in_order_then_the_file_then_the_command_line(folder):
    write("parts/one.yaml", "seed: 1\noptim: {lr: 0.1, beta1: 0.5}\nlog: {every: 3}")
    write("parts/two.yaml", "base: deeper/three.yaml\noptim: {lr: 0.2}")
    write("parts/deeper/three.yaml", "optim: {lr: 0.3, eps: 1e-4}")
    write("recipe.yaml", "base: [good.yaml, parts/one.yaml, parts/two.yaml]\nlog: {every: 4}")
    recipe = load("recipe.yaml", ["seed=7"])
    assert recipe.seed == 7
    assert (recipe.optim.lr, recipe.optim.beta1, recipe.optim.eps) == (0.2, 0.5, 1e-4)
    assert recipe.log.every == 4


def test_mappings_merge_and_lists_replace(folder):
    write("base.yaml", "base: good.yaml\ntrainable: [vision.*, decoder.*]\nmodel: {vision: {image_size: [32, 64]}}")
    write(
        "recipe.yaml",
        "base: base.yaml\ntrainable: [connector.*]\nmodel: {vision: {image_size: [16, 8]}}\n"
        "data: {sources: {b: {shards: data/b}, a: {weight: 0.5}}}",
    )
    recipe = load("recipe.yaml")
    assert recipe.trainable == ["connector.*"]
    assert recipe.model.vision.image_size == (16, 8)
    assert recipe.data.sources == {"a": Source("data/a", 0.5), "b": Source("data/b")}


def test_a_file_inherited_along_two_ways_applies_once_at_its_first_place(folder):
    write("left.yaml", "base: good.yaml\nname: left")
    write("right.yaml", "base: good.yaml\nseed: 5")
    write("recipe.yaml", "base: [left.yaml, right.yaml]")
    recipe = load("recipe.yaml")
    assert (recipe.name, recipe.seed) == ("left", 5)


def test_an_inherited_section_can_be_switched_off(folder):
    write("base.yaml", "base: good.yaml\nupcycle: {vision: {noise: 0.5}, decoder: {}}")
    recipe, origins = load_with_origins("base.yaml", ["upcycle.vision=null"])
    assert recipe.upcycle == Upcycle(vision=None, decoder=UpcyclePart(0.0))
    assert origins["upcycle.vision"] == "command line"
    assert "upcycle.vision.noise" not in origins


def test_an_empty_mapping_empties_what_was_inherited(folder):
    sources = "data: {sources: {b: {shards: data/b}}}\neval: {every: 5, sources: {c: {shards: data/c}}}"
    write("base.yaml", f"base: good.yaml\n{sources}\nmup: {{base: {{decoder: {{hidden_size: 8}}, vision: {{}}}}}}")
    recipe, origins = load_with_origins("base.yaml", ["eval.sources={}", "mup.base.decoder={}"])
    assert recipe.eval == Eval(every=5) and recipe.mup.base == {"decoder": {}, "vision": {}}
    assert origins["eval.sources"] == "command line" and "eval.sources.c.shards" not in origins
    write("only.yaml", "base: base.yaml\ndata: {sources: {}}")
    assert load("only.yaml", ["data.sources.d.shards=data/d"]).data.sources == {"d": Source("data/d")}
    kept = load(
        "base.yaml", ["eval={}", "data={}", "model.vision={}"]
    )  # sections with fixed keys have no names to drop
    assert kept == load("base.yaml")


def test_overrides_are_yaml_values(folder):
    patterns = ["trainable=[connector.*, vision.patch.*]", "optim.lr_multipliers={decoder.embedding.*: 0.1}"]
    recipe = load("good.yaml", ["optim.lr=1e-4", "init_from=", *patterns])
    assert recipe.optim.lr == 1e-4
    assert recipe.trainable == ["connector.*", "vision.patch.*"]
    assert recipe.optim.lr_multipliers == {"decoder.embedding.*": 0.1}
    assert recipe.init_from == ""


def test_launcher_flags_are_dropped(folder):
    flags = ["--local_rank=3", "--local-rank", "2", "--deepspeed", "seed=4", "--deepspeed_config", "ds.json"]
    assert without_launcher_flags(flags) == ["seed=4"]
    assert without_launcher_flags(
        ["--deepspeed", "recipe.yaml", "--deepspeed_config=x", "--local_rank", "--print"]
    ) == [
        "recipe.yaml",
        "--print",
    ]
    assert load("good.yaml", flags).seed == 4


# ---- mistakes


def test_all_mistakes_of_all_layers_come_in_one_error(folder):
    write("base.yaml", "base: good.yaml\nmodel: {vision: {moe: {topk: 2}}}\noptim: {schedule: cosin, lr: fast}")
    write("recipe.yaml", "base: base.yaml\nparallel: {zero_stage: 7}\ndata: {sources: {b: {shard: x}}}")
    lines = refused("recipe.yaml", "model.decoder.norm=rmsn", "stepz=4").splitlines()
    assert lines[0] == "recipe recipe.yaml: 7 problems"
    assert [line.removeprefix("  - ") for line in lines[1:]] == [
        "base.yaml: model.vision.moe.topk: unknown key (did you mean top_k?)",
        "base.yaml: optim.schedule: 'cosin' is not one of 'cosine', 'linear', 'constant' (did you mean cosine?)",
        "base.yaml: optim.lr: 'fast' is not a number",
        "recipe.yaml: data.sources.b.shard: unknown key (did you mean shards?)",
        "recipe.yaml: parallel.zero_stage: 7 is not one of 0, 1, 2, 3 (the nearest is 3)",
        "command line: model.decoder.norm: 'rmsn' is not one of 'rms', 'layer', 'crms' (did you mean rms?)",
        "command line: stepz: unknown key (did you mean steps?)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=1.5", "command line: steps: 1.5 is not a whole number"),
        ("steps=true", "command line: steps: True is not a whole number"),
        ("steps=null", "command line: steps: None is not a whole number"),
        ("steps=", "command line: steps: '' is not a whole number"),
        ("model.vision.class_token=maybe", "command line: model.vision.class_token: 'maybe' is not true or false"),
        ("trainable=connector.*", "command line: trainable: 'connector.*' is not a list of values, each text"),
        (
            "model.vision.image_size=64",
            "command line: model.vision.image_size: 64 is not a list of 2 values, each a whole number",
        ),
        (
            "model.vision.image_size=[1,2,3]",
            "command line: model.vision.image_size: [1, 2, 3] is not a list of 2 values, each a whole number",
        ),
        ("data.sources.b=x", "command line: data.sources.b: 'x' is not a section with keys of shards, weight"),
        ("data.sources=[x]", "command line: data.sources: ['x'] is not a mapping of names to sections"),
        ("mup.base.decoder=4", "command line: mup.base.decoder: 4 is not a mapping of names to a whole number"),
        ("optim.lr_multipliers.x=y", "command line: optim.lr_multipliers.x: 'y' is not a number"),
        ("optim.lr_multipliers={3: 0.1}", "command line: optim.lr_multipliers.3: a key is text; write it in quotes"),
        ("optim.zzz=4", "command line: optim.zzz: unknown key (known: name, lr, schedule, warmup_steps"),
        ("optim.lr", "command line: 'optim.lr' is not key=value, for example optim.lr=1e-4"),
        ("--steps=4", "command line: '--steps=4' is not key=value"),
        ("=4", "command line: '=4' is not key=value"),
        ("optim.lr={", "command line: optim.lr: '{' is not a YAML value; quote special characters"),
        ("trainable=*", "command line: trainable: '*' is not a YAML value; quote special characters"),
        ("base=good.yaml", "command line: base: inheritance belongs into a file"),
        ("seed=${steps}", "command line: seed: '${steps}' refers to another value; write the value itself"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_key_and_value(folder, override, message):
    text = refused("good.yaml", override)
    assert text.startswith(message)
    assert "\n" not in text


def test_missing_values_are_listed(folder):
    write("recipe.yaml", "data: {sources: {a: {weight: 2}}}\neval: {matching: {data: x}}")
    text = refused("recipe.yaml")
    for key in ("name", "out", "data.tokenizer", "data.sources.a.shards", "eval.matching.images"):
        assert f"recipe.yaml: {key}: no value; the recipe or {key}=... must give one" in text
    assert text.startswith("recipe recipe.yaml: 5 problems")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a: b", "recipe.yaml: not valid YAML at line 1, column 8: mapping values are not allowed"),
        ("seed: 1\nseed: 2", "recipe.yaml: not valid YAML at line 2, column 1: found duplicate key seed"),
        ("- a\n- b", "recipe.yaml: holds a list where a recipe has key: value lines"),
        ("base: 5", "recipe.yaml: base: 5 is not a file name or a list of file names"),
        ("base: [good.yaml, '']", "recipe.yaml: base: .* is not a file name or a list of file names"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place(folder, text, message):
    write("recipe.yaml", text)
    assert re.match(message, refused("recipe.yaml"))


def test_a_binary_file_is_refused(folder):
    Path("recipe.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert refused("recipe.yaml").startswith("recipe.yaml: not valid YAML: ")


def test_a_folder_is_refused(folder):
    Path("dir.yaml").mkdir()
    assert refused("dir.yaml") == "dir.yaml: cannot be read: Is a directory"


def test_a_missing_file_names_the_nearest(folder):
    assert refused("god.yaml") == "god.yaml: no such file (did you mean good.yaml?)"
    write("recipe.yaml", "base: goood.yaml")
    assert refused("recipe.yaml") == "goood.yaml (base of recipe.yaml): no such file (did you mean good.yaml?)"
    assert refused("nowhere/x.yaml") == "nowhere/x.yaml: no such file (the folder nowhere has no .yaml files)"


def test_inheritance_in_a_circle_is_refused(folder):
    write("a.yaml", "base: sub/b.yaml")
    write("sub/b.yaml", "base: ../a.yaml")
    assert refused("a.yaml") == "inherits from itself: a.yaml -> sub/b.yaml -> a.yaml"


# ---- writing it down


def full():
    return changed(
        RECIPE,
        upcycle=Upcycle(vision=UpcyclePart(0.25), decoder=UpcyclePart()),
        eval=Eval(every=5, sources={"held": Source("data/h", 2.0)}, matching=Matching("m.jsonl", "images")),
        mup__base={"decoder": {"hidden_size": 16}},
        mup__lr={"vision": 0.5},
        optim__lr_multipliers={"decoder.embedding.*": 0.1},
        guard__skip_steps=[3, 4],
    )


def test_a_dumped_recipe_loads_as_the_same_recipe(folder):
    for recipe in (RECIPE, full()):
        assert load(write("dumped.yaml", dump(recipe))) == recipe


@settings(deadline=None, max_examples=15)
@given(
    lr=st.floats(min_value=1e-12, max_value=10),
    name=st.text(st.characters(codec="utf-8", exclude_categories=("C",)), min_size=1),
    key=st.text("abc.*_ :'\"#", min_size=1),
)
def test_any_number_and_text_survives_the_dump(tmp_path_factory, lr, name, key):
    assume(name != "???" and "${" not in name)  # the two texts with a meaning of their own
    recipe = changed(RECIPE, name=name, optim__lr=lr, optim__lr_multipliers={key: lr})
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path) == recipe


def test_show_names_the_origin_of_every_value(folder):
    write("recipe.yaml", "base: good.yaml\noptim: {lr: 0.5}\nupcycle: {vision: {}}")
    lines = show(*load_with_origins("recipe.yaml", ["seed=3"])).splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["seed"].split() == ["3", "command", "line"]
    assert rows["optim.lr"].split() == ["0.5", "recipe.yaml"]
    assert rows["data.sources.a.shards"].split() == ["data/a", "good.yaml"]
    assert rows["data.sources.a.weight"].split() == ["1.0", "default"]
    assert rows["upcycle.vision.noise"].split() == ["0.0", "recipe.yaml"]
    assert rows["upcycle.decoder"].split() == ["null", "default"]
    assert rows["model.vision.image_size"].split() == ["[224,", "224]", "default"]
