"""Every file under configs/ loads, fits the ranks that its header names, and builds a model of the stated size."""

import re
from pathlib import Path

import pytest

from mmtrain.config.check import check, problems
from mmtrain.config.errors import ConfigError
from mmtrain.config.load import load
from mmtrain.config.schema import Recipe
from mmtrain.model.build import parameter_counts

ROOT = Path(__file__).parents[2] / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
RECIPES = [path for path in FILES if "recipes" in path.parts]
FRAGMENTS = [path for path in FILES if "recipes" not in path.parts and "sweeps" not in path.parts]
SIZED = [path for path in FILES if "recipes" in path.parts or path.parent.name == "model"]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def header(path: Path) -> str:
    """The comment lines that a file starts with."""
    return re.match(r"(#.*\n)*", path.read_text())[0]


def ranks(path: Path) -> int:
    """The world size that a header states; 64 for files that state none and fit any."""
    found = re.search(r"^# ranks: (\d+)$", header(path), re.MULTILINE)
    return int(found[1]) if found else 64


def loaded(path: Path, folder: Path) -> Recipe:
    """A recipe; or a fragment on top of base.yaml and, unless it is a model, of one with heads and experts to share."""
    if path in RECIPES:
        return load(path)
    model = path if path.parent.name == "model" else ROOT / "model/mm1_7b_32e.yaml"
    whole = folder / "whole.yaml"
    whole.write_text(f"base: {[str(base) for base in (ROOT / 'base.yaml', model, path)]}\n")
    needed = ["name=fragment", "out=runs/fragment", "steps=10", "data.tokenizer=t.json", "data.sources.extra.shards=x"]
    return load(whole, [*needed, "data.sequence_length=4096", "data.global_batch=512"])


def test_there_are_configs_of_every_kind():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} >= {"base.yaml", "model", "data", "parallel", "recipes"}
    assert len(RECIPES) >= 12


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_says_what_it_needs(path):
    for line in (r"hardware: \S", r"command: \S", r"ranks: \d+$", r"parameters: total [\d,]+ active [\d,]+$"):
        assert re.search(f"^# {line}", header(path), re.MULTILINE), line


@pytest.mark.parametrize("path", FRAGMENTS, ids=named)
def test_a_fragment_fits_onto_the_base(path, tmp_path):
    check(loaded(path, tmp_path), ranks(path))


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_fits_its_ranks(path):
    recipe = load(path)
    if recipe.requires_pretrained and not recipe.init_from:
        (only,) = problems(recipe, ranks(path))
        assert only.startswith("init_from is empty: this recipe starts from pretrained weights")
        recipe = load(path, ["init_from=pretrained"])
    check(recipe, ranks(path))


@pytest.mark.parametrize("path", SIZED, ids=named)
def test_the_model_has_the_size_that_the_header_states(path, tmp_path):
    count = parameter_counts(loaded(path, tmp_path).model)["all"]
    assert f"# parameters: total {count.total:,} active {count.active:,}\n" in header(path)


@pytest.mark.parametrize("name", ["cumo_7b/1_align.yaml", "mm1_3b_64e.yaml", "mm1_7b_32e.yaml", "mm1_30b.yaml"])
def test_a_recipe_that_needs_pretrained_weights_says_so_in_header_and_error(name):
    path = ROOT / "recipes" / name
    assert "# Needs pretrained weights of" in header(path)
    with pytest.raises(
        ConfigError, match=r"cannot run on \d+ ranks: init_from is empty: .* give init_from=CHECKPOINT, "
    ):
        check(load(path), ranks(path))


@pytest.mark.parametrize("chain", ["demo", "real", "cumo_7b"])
def test_each_stage_starts_from_the_run_of_the_one_before(chain):
    stages = [load(path) for path in sorted((ROOT / "recipes" / chain).glob("*.yaml"))]
    assert [stage.init_from for stage in stages] == ["", stages[0].out, stages[1].out]
    assert [part for part in ("vision", "connector", "decoder") if getattr(stages[2].upcycle, part) is None] == []
