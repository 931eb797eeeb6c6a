from collections import Counter
from dataclasses import replace

import pytest
import torch

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Mup, Optim, Recipe
from mmtrain.mup.init import initialize
from mmtrain.mup.registry import Registry
from mmtrain.optim.groups import param_groups, trainable_names
from mmtrain.optim.schedule import lr_factor
from tests.mup.toy import Widths, closed_form, toy

BASE = Widths()
GROWN = Widths(vision=64, experts=4, expert_ffn=48, connector=24, decoder=160, kv=8, ffn=120)
OPTIM = Optim(lr=0.01, weight_decay=0.1, eps=1e-8)


@pytest.fixture
def registry() -> Registry:
    return Registry.build(toy(GROWN), toy(BASE), Mup(lr={"vision": 0.5}))


@pytest.fixture
def parameters() -> dict[str, torch.nn.Parameter]:
    return dict(toy(GROWN, device="cpu").named_parameters())


def recipe(**changes) -> Recipe:
    return Recipe(name="test", out="nowhere", **{"optim": OPTIM, **changes})


def by_name(groups: list[dict]) -> dict[str, dict]:
    return {name: group for group in groups for name in group["names"]}


def test_every_parameter_is_in_one_group_with_its_own_numbers(registry, parameters):
    groups = param_groups(parameters, registry, recipe())
    assert Counter(name for group in groups for name in group["names"]) == Counter(list(parameters))
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        assert all(parameters[name] is one for name, one in zip(group["names"], group["params"], strict=True))
    for name, (_, lr, decay, eps) in closed_form(GROWN, BASE).items():
        group = by_name(groups)[name]
        part = name.split(".")[0]
        assert group["lr"] == pytest.approx(0.01 * lr * (0.5 if part == "vision" else 1.0)), name
        assert group["weight_decay"] == pytest.approx(0.1 * decay), name
        assert group["eps"] == pytest.approx(1e-8 * eps), name
        assert group["part"] == part, name
        assert group["expert"] == (".experts." in name), name


def test_groups_are_as_few_as_possible(registry, parameters):
    groups = param_groups(parameters, registry, recipe())
    keys = [(g["part"], g["expert"], g["lr"], g["weight_decay"], g["eps"]) for g in groups]
    assert len(set(keys)) == len(keys)
    q = by_name(groups)["vision.blocks.0.attention.q.weight"]
    assert "vision.blocks.0.mlp.experts.up" not in q["names"]


def test_one_dimensional_tensors_never_decay(registry, parameters):
    for group in param_groups(parameters, registry, recipe()):
        if group["weight_decay"] > 0:
            assert all(parameter.ndim > 1 for parameter in group["params"])
            assert not any(name.endswith("_bias") for name in group["names"])


def test_frozen_parameters_are_in_no_group(registry, parameters):
    groups = param_groups(parameters, registry, recipe(trainable=["connector.*", "*.router.weight"]))
    trained = {name for name in parameters if name.startswith("connector.") or "router" in name}
    assert set(by_name(groups)) == trained == trainable_names(list(parameters), ["connector.*", "*.router.weight"])


def test_a_rank_may_hold_some_of_the_parameters(registry, parameters):
    some = {name: parameters[name] for name in list(parameters)[::3]}
    assert set(by_name(param_groups(some, registry, recipe(trainable=["*"])))) == set(some)


def test_every_matching_pattern_multiplies(registry, parameters):
    plain = by_name(param_groups(parameters, registry, recipe()))
    multipliers = {"vision.*": 2.0, "*.experts.*": 0.25, "decoder.head.weight": 3.0}
    tuned = by_name(param_groups(parameters, registry, recipe(optim=replace(OPTIM, lr_multipliers=multipliers))))
    for name, group in plain.items():
        factor = (2.0 if name.startswith("vision.") else 1.0) * (0.25 if ".experts." in name else 1.0)
        factor *= 3.0 if name == "decoder.head.weight" else 1.0
        assert tuned[name]["lr"] == pytest.approx(group["lr"] * factor), name
        assert tuned[name]["weight_decay"] == group["weight_decay"], name


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(registry, parameters):
    message = (
        r"optim\.lr_multipliers\.decoder\.haed\.weight: matches none of 17 parameters \(did you mean decoder\.head\.w"
    )
    with pytest.raises(ConfigError, match=message):
        param_groups(parameters, registry, recipe(optim=replace(OPTIM, lr_multipliers={"decoder.haed.weight": 2.0})))
    message = (
        r"trainable: conector\.mlp\.up\.weight: matches none of 17 parameters \(did you mean connector\.mlp\.up\.w"
    )
    with pytest.raises(ConfigError, match=message):
        param_groups(parameters, registry, recipe(trainable=["decoder.*", "conector.mlp.up.weight"]))


def test_the_first_step_of_adam_moves_every_weight_by_its_own_rate(registry):
    """At step 1 Adam's update is lr * sign(gradient), whatever the gradient: an audit of the whole chain of factors."""
    model = toy(GROWN, device="cpu")
    initialize(model, registry, seed=0)
    parameters = dict(model.named_parameters())
    chosen = recipe(optim=replace(OPTIM, warmup_steps=4, eps=1e-30))
    groups = param_groups(parameters, registry, chosen)
    factor = lr_factor(1, chosen.optim, total_steps=10)
    scheduled = [{**group, "lr": group["lr"] * factor} for group in groups]
    optimizer = torch.optim.AdamW(scheduled, betas=(0.9, 0.95))
    before = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for name, (_, lr, decay, _) in closed_form(GROWN, BASE).items():
        lr *= 0.01 * factor * (0.5 if name.startswith("vision.") else 1.0)
        moved = parameters[name].detach().double() - before[name] * (1 - lr * 0.1 * decay)
        assert moved.abs().median().item() == pytest.approx(lr, rel=1e-3), name
