from dataclasses import replace

import pytest
import torch

from mmtrain.config.schema import Mup
from mmtrain.mup.init import initial, initial_expert, initialize
from mmtrain.mup.registry import Registry
from tests.mup.toy import VOCAB, Widths, toy

WIDE = Widths(vision=256, experts=4, expert_ffn=128, connector=512, decoder=512, kv=128, ffn=256)
BASE = Widths()
EXPERTS = "vision.blocks.0.mlp.experts.up"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.build(toy(WIDE), toy(BASE), Mup())


def values(registry: Registry, seed: int = 3) -> dict[str, torch.Tensor]:
    return {name: initial(name, entry, entry.shape, seed) for name, entry in registry.entries.items()}


def test_the_std_is_the_tables(registry):
    checked = 0
    for name, tensor in values(registry).items():
        entry = registry[name]
        assert (tensor.shape, tensor.dtype, tensor.device.type) == (entry.shape, torch.float32, "cpu"), name
        kept = tensor[: entry.role.rows]
        if entry.role.init == "normal" and kept.numel() > 10_000:
            assert kept.std().item() == pytest.approx(entry.init_std, rel=0.03), name
            assert abs(kept.mean().item()) < 0.03 * entry.init_std, name
            checked += 1
    assert checked >= 8


def test_gains_are_ones_and_biases_zeros(registry):
    made = values(registry)
    assert made["vision.blocks.0.norm1.weight"].eq(1).all()
    assert made["vision.blocks.0.mlp.experts.up_bias"].eq(0).all()


def test_padding_rows_of_the_vocabulary_are_zero(registry):
    made = values(registry)
    for name in ("decoder.embedding.weight", "decoder.head.weight"):
        assert made[name][VOCAB:].eq(0).all()
        assert made[name][:VOCAB].ne(0).all()


def test_padding_does_not_change_the_real_rows(registry):
    entry = registry["decoder.head.weight"]
    whole = initial("decoder.head.weight", entry, entry.shape, 3)
    shorter = initial("decoder.head.weight", entry, (VOCAB, entry.shape[1]), 3)
    assert torch.equal(whole[:VOCAB], shorter)


def test_a_tensor_depends_on_seed_and_name_alone(registry):
    torch.manual_seed(1)
    first = values(registry)
    torch.manual_seed(2)
    torch.rand(5)
    second = {name: initial(name, registry[name], registry[name].shape, 3) for name in reversed(registry.entries)}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    other_seed = values(registry, seed=4)
    drawn = [name for name, entry in registry.entries.items() if entry.role.init == "normal"]
    for name in drawn:
        assert not torch.equal(first[name], other_seed[name]), name
    heads = {first[name].flatten()[:4].div(registry[name].init_std).numpy().tobytes() for name in drawn}
    assert len(heads) == len(drawn)


def test_drawing_leaves_the_global_generator_alone(registry):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    values(registry)
    assert torch.equal(before, torch.get_rng_state())


def test_an_expert_can_be_made_alone(registry):
    entry = registry[EXPERTS]
    whole = initial(EXPERTS, entry, entry.shape, 3)
    for expert in range(WIDE.experts):
        assert torch.equal(whole[expert], initial_expert(EXPERTS, entry, entry.shape[1:], expert, 3))
    assert len({whole[expert].numpy().tobytes() for expert in range(WIDE.experts)}) == WIDE.experts


def test_more_experts_keep_the_first_ones():
    small = Registry.build(toy(WIDE), toy(WIDE), Mup())[EXPERTS]
    more = replace(WIDE, experts=6)
    large = Registry.build(toy(more), toy(more), Mup())[EXPERTS]
    assert torch.equal(initial(EXPERTS, small, small.shape, 0), initial(EXPERTS, large, large.shape, 0)[:4])


def test_width_changes_the_scale_of_the_same_draw():
    name = "vision.blocks.0.attention.q.weight"
    at_base = Registry.build(toy(WIDE), toy(WIDE), Mup())[name]
    grown = Registry.build(toy(WIDE), toy(BASE), Mup())[name]
    a, b = (initial(name, entry, entry.shape, 5) for entry in (at_base, grown))
    # SP's std is 1/sqrt(fan_in) at any width, and so is the muP's of a hidden matrix: the same numbers.
    assert torch.allclose(a, b, rtol=1e-6)
    router = "vision.blocks.0.mlp.router.weight"
    at_base = Registry.build(toy(WIDE), toy(WIDE), Mup())[router]
    grown = Registry.build(toy(WIDE), toy(BASE), Mup())[router]
    a, b = (initial(router, entry, entry.shape, 5) for entry in (at_base, grown))
    assert torch.allclose(b, a * (BASE.vision / WIDE.vision) ** 0.5, rtol=1e-6)


def test_initialize_fills_a_whole_model_in_place(registry):
    model = toy(WIDE, device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    initialize(model, registry, seed=3)
    expected = values(registry)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad, name
