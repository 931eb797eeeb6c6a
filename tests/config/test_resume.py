"""What a resumed run may change."""

from dataclasses import replace

import pytest

from mmtrain.config.resume import resume_differences
from mmtrain.config.schema import Moe, Source, Upcycle, UpcyclePart
from tests.config.sample import RECIPE, changed


def test_equal_recipes_differ_in_nothing():
    assert resume_differences(RECIPE, RECIPE) == ([], [])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"steps": 20}, "steps: 10 -> 20"),
        ({"epochs": 1.0}, "epochs: 0.0 -> 1.0"),
        ({"log__every": 1}, "log.every: 10 -> 1"),
        ({"eval__batches": 2}, "eval.batches: 8 -> 2"),
        ({"eval__sources": {"h": Source("x")}}, "eval.sources.h.shards: not set -> x"),
        ({"checkpoint__every": 5}, "checkpoint.every: 500 -> 5"),
        ({"parallel__tensor": 2}, "parallel.tensor: 1 -> 2"),
        ({"guard__max_skips": 3}, "guard.max_skips: 10 -> 3"),
        ({"resume": "never"}, "resume: auto -> never"),
        ({"out": "elsewhere"}, "out: runs/sample -> elsewhere"),
        ({"data__workers": 4}, "data.workers: 1 -> 4"),
        ({"data__skip_packs": [7]}, "data.skip_packs: [] -> [7]"),
        ({"data__max_bad_fraction": 0.5}, "data.max_bad_fraction: 0.01 -> 0.5"),
        ({"data__micro_batch": 4}, "data.micro_batch: 1 -> 4"),
    ],
)
def test_how_a_run_is_done_may_change(values, line):
    allowed, refused = resume_differences(RECIPE, changed(RECIPE, **values))
    assert line in allowed
    assert refused == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"model__decoder__norm": "crms"}, "model.decoder.norm: rms -> crms"),
        ({"model__vision__moe": Moe(num_experts=4)}, "model.vision.moe.num_experts: 0 -> 4"),
        ({"mup__init": 2.0}, "mup.init: 1.0 -> 2.0"),
        ({"parallel__precision": "bf16"}, "parallel.precision: fp32 -> bf16"),
        ({"data__global_batch": 16}, "data.global_batch: 8 -> 16"),
        ({"data__sources": {"a": Source("data/a", 0.5)}}, "data.sources.a.weight: 1.0 -> 0.5"),
        ({"optim__lr": 1.0}, "optim.lr: 0.001 -> 1.0"),
        ({"optim__lr_multipliers": {"vision.*": 0.1}}, "optim.lr_multipliers.vision.*: not set -> 0.1"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"trainable": ["vision.*"]}, "trainable: ['*'] -> ['vision.*']"),
        ({"init_from": "x"}, "init_from:  -> x"),
        ({"upcycle": Upcycle(vision=UpcyclePart())}, "upcycle.vision.noise: not set -> 0.0"),
    ],
)
def test_what_a_run_computes_may_not_change_unless_named(values, line):
    new = changed(RECIPE, **values)
    key = line.partition(":")[0]
    allowed, refused = resume_differences(RECIPE, new)
    assert line in refused
    assert allowed == []
    for name in (key, key.partition(".")[0]):  # the key itself, or its section
        allowed, refused = resume_differences(RECIPE, replace(new, resume_allow=[name]))
        assert line in allowed
        assert line not in refused


def test_a_name_in_resume_allow_frees_no_other_key_that_begins_alike():
    new = changed(RECIPE, optim__lr_multipliers={"vision.*": 2.0}, resume_allow=["optim.lr"])
    assert "optim.lr_multipliers.vision.*: not set -> 2.0" in resume_differences(RECIPE, new)[1]


def test_a_source_that_is_gone_is_a_difference():
    old = changed(RECIPE, data__sources={"a": Source("data/a"), "b": Source("data/b")})
    assert "data.sources.b.shards: data/b -> not set" in resume_differences(old, RECIPE)[1]
