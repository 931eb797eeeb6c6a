"""Settings that would undo muP are refused by name, each with its reason."""

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.config.load import load
from mmtrain.config.refused import KEYS, VALUES


def error(folder, override: str) -> str:
    """The words of the error that a recipe gets with an override."""
    recipe = folder / "recipe.yaml"
    recipe.write_text("name: a\nout: b\ndata: {tokenizer: c}\n")
    load(recipe)
    with pytest.raises(ConfigError) as caught:
        load(recipe, [override])
    return str(caught.value)


@pytest.mark.parametrize("schedule", ["WarmupLR", "WarmupDecayLR", "OneCycle", "LRRangeTest"])
def test_schedules_that_set_one_rate_for_all_groups(tmp_path, schedule):
    assert error(tmp_path, f"optim.schedule={schedule}") == (
        f"command line: optim.schedule: '{schedule}' is not one of 'cosine', 'linear', 'constant': sets one rate for "
        "all parameter groups, which erases muP's ratios between them; take cosine, linear or constant with "
        "optim.warmup_steps, which multiply each group's own rate"
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "muon",
            "gives each matrix an update of one spectral norm: its rates go by other powers of width, and",
        ),
        ("LAMB", "scales each tensor's update by the tensor's own norm, which changes with width"),
        ("lars", "scales each tensor's update by the tensor's own norm, which changes with width"),
        ("adafactor", "scales each tensor's update by the tensor's own norm, which changes with width"),
        ("lion", "the rates of mmtrain/mup/rules.py are those of Adam's update; take adamw"),
    ],
)
def test_optimizers_whose_rates_are_not_adams(tmp_path, name, why):
    words = error(tmp_path, f"optim.name={name}")
    assert words.startswith(f"command line: optim.name: '{name}' is not one of 'adamw', 'sgd': {why}")
    assert words.endswith("the rates of mmtrain/mup/rules.py are those of Adam's update; take adamw")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("optim.scheduler=OneCycle", "a schedule of DeepSpeed or torch may set one rate for all parameter groups"),
        ("optim.min_lr=1e-5", "one absolute rate for all groups erases muP's ratios between them; give"),
        ("optim.max_lr=1e-5", "one absolute rate for all groups erases muP's ratios between them; give"),
        ("optim.clip_value=1.0", "entries of a gradient shrink with width, so one absolute bound on each clips narrow"),
    ],
)
def test_options_that_are_absolute(tmp_path, override, why):
    assert error(tmp_path, override).startswith(f"command line: {override.partition('=')[0]}: {why}")


def test_a_slip_of_the_pen_is_still_one(tmp_path):
    assert error(tmp_path, "optim.name=adam").endswith("'adamw', 'sgd' (did you mean adamw?)")
    assert "did you mean clip" in error(tmp_path, "optim.clips=1")


def test_every_line_of_the_list_is_tested_above():
    assert VALUES["optim.schedule"].keys() == {"warmuplr", "warmupdecaylr", "onecycle", "lrrangetest"}
    assert VALUES["optim.name"].keys() == {"muon", "lamb", "lars", "adafactor"}
    assert VALUES.keys() == {"optim.name", "optim.schedule"}
    assert KEYS.keys() == {"optim.scheduler", "optim.min_lr", "optim.max_lr", "optim.clip_value"}
