"""Sweep files: what is read, and the one error of each mistake."""

from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.sweep.spec import VARIANT, Budget, Choices, Prune, Range, read_sweep

ROOT = Path(__file__).parents[2] / "configs" / "sweeps"
RECIPE = """
name: small
out: nowhere
steps: 10
data: {tokenizer: nowhere.json, sources: {a: {shards: nowhere}}}
eval: {every: 5, sources: {held: {shards: nowhere}}}
"""
SWEEP = """
name: s
recipe: recipe.yaml
out: runs/s
sampler: grid
search:
  seed: {choices: [0, 1]}
  optim.lr: {choices: [0.1, 0.2, 0.4]}
variants: {narrow: [model.decoder.hidden_size=64], wide: [model.decoder.hidden_size=128]}
"""


@pytest.fixture
def write(tmp_path):
    """write(text): a sweep file beside a recipe."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)

    def written(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return written


def test_a_grid_is_every_point_of_every_variant_once(write):
    sweep = read_sweep(write(SWEEP))
    points = sweep.points()
    assert len(points) == 12 and len({tuple(sorted(point.items())) for point in points}) == 12
    assert points[0] == {"seed": 0, "optim.lr": 0.1, VARIANT: "narrow"}
    assert points[1] == {**points[0], VARIANT: "wide"}
    assert [point["seed"] for point in points] == [0] * 6 + [1] * 6


def test_a_point_is_a_recipe_with_its_values_on_top(write):
    sweep = read_sweep(write(SWEEP.replace("sampler", "set: [steps=7, optim.lr=9]\nsampler")))
    recipe = sweep.recipe_of({"seed": 1, "optim.lr": 0.4, VARIANT: "wide"}, Path("runs/s/0"), ("init_from=x",))
    found = recipe.seed, recipe.optim.lr, recipe.steps, recipe.model.decoder.hidden_size, recipe.out, recipe.init_from
    assert found == (1, 0.4, 7, 128, "runs/s/0", "x")


def test_ranges_and_sections_are_read(write):
    text = SWEEP.replace("grid", "tpe\ntrials: 3").replace("{choices: [0.1, 0.2, 0.4]}", "{low: 1e-3, high: 1.0}")
    text = text.replace("seed: {choices: [0, 1]}", "mup.init: {choices: [1, 2]}").partition("variants:")[0]
    sweep = read_sweep(write(text + "prune: {startup: 2}\nrepeat: {best: 1, seeds: [5]}\nbudget: {tokens: 1e6}\n"))
    assert sweep.search == {"mup.init": Choices((1, 2)), "optim.lr": Range(1e-3, 1.0)}
    assert sweep.prune.startup == 2 and sweep.repeat.seeds == (5,) and sweep.budget == Budget(tokens=1e6)


def test_numbers_are_numbers_however_they_are_written(write):
    text = SWEEP.replace("[0.1, 0.2, 0.4]", "[1e-3, 4e-3, '16']") + "prune: {warmup: 3e-1}\n"
    sweep = read_sweep(write(text + "budget: {flops: 5e8}\n"))
    assert sweep.search["optim.lr"] == Choices((0.001, 0.004, "16"))
    assert (sweep.prune, sweep.budget) == (Prune(warmup=0.3), Budget(flops=5e8))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("sampler: grid", "sampler: gird", "sampler: 'gird' is none of tpe, random, grid"),
        ("sampler: grid", "sampelr: grid", "sampelr: unknown key (did you mean sampler?)"),
        ("sampler: grid", "sampler: tpe", "trials: 0; say how many points to try"),
        ("sampler: grid", "trials: some", "trials: 'some' is not a whole number of at least 0"),
        ("sampler: grid", "sampler: grid\nprune: {start: 1}", "prune.start: unknown key (did you mean startup?)"),
        ("sampler: grid", "sampler: grid\nprune: [1]", "prune: [1] is not a section with startup, warmup"),
        ("sampler: grid", "sampler: grid\nprune: {warmup: some}", "prune.warmup: 'some' is not a number of at least 0"),
        ("sampler: grid", "sampler: grid\nrepeat: {best: 1}", "repeat.seeds: no value"),
        ("sampler: grid", "sampler: grid\nrepeat: {best: 1, seeds: 5}", "repeat.seeds: 5 is not a list of different"),
        ("sampler: grid", "sampler: grid\nrepeat: {best: 1, seeds: [5, 5]}", "repeat.seeds: [5, 5] is not a list of"),
        ("sampler: grid", "sampler: grid\nrepeat: {best: 1, seeds: [5]}", "repeat: seed is searched, so every point"),
        ("  seed: {choices: [0, 1]}", "repeat: {best: 1, seeds: [0, 5]}\nsearch:", "repeat.seeds: 0 is the first"),
        ("sampler: grid", "sampler: grid\nbudget: {tokens: -4}", "budget.tokens: -4 is not a number of at least 0"),
        ("sampler: grid", "sampler: grid\nbudget: {tokens: yes}", "budget.tokens: True is not a number of at least 0"),
        ("sampler: grid", "parent: {recipe: recipe.yaml, set: steps=3}", "parent.set: 'steps=3' is not a list of key="),
        ("sampler: grid", "parent: {recipe: recipe.yaml, set: [steps: 3]}", "parent.set: [{'steps': 3}] is not a list"),
        ("sampler: grid", "parent: {recipe: 3}", "parent.recipe: 3 is not the name of a file"),
        (
            "name: s",
            "name: s\nparent: {recipe: recipe.yaml, set: [steps=0]}",
            "steps=0 and epochs=0: the stage",
        ),
        ("sampler: grid", "sampler: tpe\ntrials: 3", "sampler: tpe would search the best of the variants too"),
        ("name: s", "name: 3", "name: 3 is not text; write it in quotes"),
        (
            "  seed: {choices: [0, 1]}\n  optim.lr: {choices: [0.1, 0.2, 0.4]}",
            "- optim.lr",
            "search: ['optim.",
        ),
        ("  seed:", "  variant:", "search.variant: no key of a recipe; list the variants under variants"),
        (
            "  seed: {choices: [0, 1]}",
            "  seed: {choices: [[0], 1]}",
            "search.seed: [[0], 1] are not all",
        ),
        ("[0.1, 0.2, 0.4]", "[0.1, 1e-1]", "search.optim.lr: [0.1, '1e-1'] holds a choice twice"),
        ("  seed:", "  mup.lr.vison:", "mup.lr.vison: no such part"),
        ("decoder.hidden_size=128", "vision.hidden_size=127", "hidden_size=127 is not a multiple of"),
        ("sampler: grid", "sampler: grid\nbudget: {}", "budget: give tokens or flops, one of both"),
        ("sampler: grid", "sampler: grid\nobjective: other", "objective: other: the recipe measures all, held"),
        ("name: s", "name:", "name: no value"),
        ("{choices: [0, 1]}", "{low: 1, high: 2}", "search: a grid has choices only, but seed is a range"),
        ("{choices: [0, 1]}", "{low: 2, high: 1}", "search.seed: low 2 and high 1 must be numbers with 0 < low < high"),
        ("{choices: [0, 1]}", "{choices: []}", "search.seed: no choices"),
        ("{choices: [0, 1]}", "7", "search.seed: 7 is neither {low: A, high: B} nor {choices: [A, B]}"),
        ("  seed:", "  optim.rl:", "optim.rl: unknown key"),
        ("hidden_size=128", "hidden_sise=128", "model.decoder.hidden_sise: unknown key"),
        ("[model.decoder.hidden_size=64]", "[64]", "variants.narrow: [64] is not a list of key=value"),
        ("recipe: recipe.yaml", "recipe: none.yaml", "no such file"),
    ],
)
def test_a_mistake_is_one_error_that_says_where(write, old, new, told):
    assert old in SWEEP
    with pytest.raises(ConfigError) as error:
        read_sweep(write(SWEEP.replace(old, new)))
    assert told in str(error.value)


def test_files_that_are_no_sweeps_are_told(write, tmp_path):
    with pytest.raises(ConfigError, match=r"sweep\.yaml: not valid YAML"):
        read_sweep(write("a: {"))
    with pytest.raises(ConfigError, match=r"holds no key: value lines"):
        read_sweep(write("- a"))
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_sweep(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_read(path):
    sweep = read_sweep(path)
    for variant in sweep.variants:
        sweep.parent_of(variant)
    header = path.read_text()
    assert "# hardware: " in header and f"python launch/sweep.py configs/sweeps/{path.name}" in header
