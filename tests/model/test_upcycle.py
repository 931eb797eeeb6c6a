"""Co-upcycling: the sparse model computes what its dense parent computes."""

import pytest
import torch

from mmtrain.config.experts import expert_problems, preserving_scale, routed_slices
from mmtrain.config.schema import Moe
from mmtrain.model.stepio import first_inputs
from mmtrain.model.upcycle import (
    Copy,
    Experts,
    Fresh,
    Shared,
    dense_shape,
    grouped_rows,
    routed_part,
    shared_part,
    source_of,
    upcycled,
)
from mmtrain.model.vlm import VisionLanguageModel
from tests.model.small import ALL_PARTS, DENSE, built, micro, sparse

CASES = [("vision",), ("connector",), ("decoder",), ALL_PARTS]


def upcycle(dense: VisionLanguageModel, target: VisionLanguageModel, noise: float = 0.0, seed: int = 0) -> None:
    """Fill `target` from `dense` by the map; routers get std 1, so that loads are ragged."""
    tensors = dict(dense.named_parameters())
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            match source_of(name, tensors.keys()):
                case Copy(origin):
                    parameter.copy_(tensors[origin])
                case Experts(origin) as found:
                    moe = getattr(target.config, name.partition(".")[0]).moe
                    assert dense_shape(found, tuple(parameter.shape), moe) == tuple(tensors[origin].shape)
                    for expert in range(parameter.shape[0]):
                        part = routed_part(origin, tensors[origin], expert, moe)
                        parameter[expert] = upcycled(name, part, expert, noise, seed)
                case Shared(origin) as found:
                    moe = getattr(target.config, name.partition(".")[0]).moe
                    assert dense_shape(found, tuple(parameter.shape), moe) == tuple(tensors[origin].shape)
                    parameter.copy_(shared_part(origin, tensors[origin], moe))
                case Fresh():
                    assert name.endswith("mlp.router.weight")
                    moe = getattr(target.config, name.partition(".")[0]).moe
                    parameter.copy_(grouped_rows(torch.randn(parameter.shape, generator=draw), moe))


@pytest.mark.parametrize("parts", CASES, ids="+".join)
@pytest.mark.parametrize("every", [1, 2])
def test_without_noise_the_logits_are_those_of_the_dense_parent(parts: tuple[str, ...], every: int) -> None:
    config = sparse(DENSE, *parts, moe=Moe(num_experts=5, top_k=2, every=every, balance="bias"))
    dense, target = built(DENSE), VisionLanguageModel(config)
    upcycle(dense, target)
    assert any((bias != 0).any() for name, bias in dense.named_parameters() if name.endswith("mlp.up.bias"))
    batch = micro(DENSE, [[("it", 1), ("tit", 2)], [("itit", 3), ("t", 4)]], 26)
    inputs = first_inputs(config)
    for router in inputs.routers.values():  # one expert that nobody ever chooses
        router.bias[:, 2] = -1e4
    at = torch.arange(52)
    with torch.no_grad():
        want = dense(batch, first_inputs(DENSE), logits_at=at)
        got = target(batch, inputs, logits_at=at)
        counts = target(batch, inputs).counts
    assert (got - want).abs().max() <= 1e-5
    assert set(counts) == set(parts)
    for part in parts:
        assert (counts[part][:, 2] == 0).all()
        least, most = counts[part].sort(1).values[:, [1, 4]].unbind(1)
        assert (most > 1.2 * least).all()  # the loads are ragged


SLICED = {
    "slices": Moe(num_experts=8, top_k=4, granularity=4, routed_scale=4.0),
    "slices, two copies chosen of four": Moe(num_experts=16, top_k=8, granularity=4, routed_scale=4.0),
    "one slice shared": Moe(num_experts=9, top_k=6, granularity=4, shared=1, routed_scale=3.0),
    "three slices shared": Moe(num_experts=5, top_k=2, granularity=4, shared=3, routed_scale=1.0),
    "copies beside a shared copy": Moe(num_experts=4, top_k=2, shared=1, routed_scale=0.5),
    "slices beside a shared copy": Moe(num_experts=6, top_k=4, granularity=2, shared=2, routed_scale=1.0),
}


@pytest.mark.parametrize("moe", SLICED.values(), ids=SLICED.keys())
def test_slices_and_shared_experts_add_up_to_the_dense_parent(moe: Moe) -> None:
    config = sparse(DENSE, *ALL_PARTS, moe=moe)
    assert not list(expert_problems(config)) and moe.routed_scale == preserving_scale(moe)
    dense, target = built(DENSE), VisionLanguageModel(config)
    upcycle(dense, target)
    batch = micro(DENSE, [[("it", 1), ("tit", 2)], [("itit", 3), ("t", 4)]], 26)
    at = torch.arange(52)
    with torch.no_grad():
        want = dense(batch, first_inputs(DENSE), logits_at=at)
        got = target(batch, first_inputs(config), logits_at=at)
        counts = target(batch, first_inputs(config)).counts
    assert want.std() > 0.1 and (got - want).abs().max() <= 1e-5
    for part in ALL_PARTS:  # whole copies are chosen, and not all of them alike
        copies = counts[part].unflatten(1, (-1, routed_slices(moe)))
        assert (copies == copies[..., :1]).all() and copies[..., 0].std(1).min() > 0


def test_slices_tile_the_dense_tensor() -> None:
    moe = Moe(num_experts=6, top_k=3, granularity=4, shared=1, routed_scale=3.0)
    up, down = torch.randn(8, 5), torch.randn(5, 8)
    for name, dense, dim in (("a.mlp.up.weight", up, 0), ("a.mlp.down.weight", down, 1)):
        first = [routed_part(name, dense, expert, moe) for expert in range(3)]
        assert torch.equal(torch.cat([shared_part(name, dense, moe), *first], dim), dense)
        second = [routed_part(name, dense, expert, moe) for expert in range(3, 6)]
        assert all(map(torch.equal, first, second))


def test_noise_moves_each_expert_by_its_own_reproducible_draw() -> None:
    dense = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * 0.3
    name = "decoder.blocks.0.mlp.experts.up"
    assert upcycled(name, dense, 1, 0.0, seed=5) is dense
    copies = [upcycled(name, dense, expert, 0.01, seed=5) for expert in range(3)]
    for copy in copies:
        assert (copy - dense).std() == pytest.approx(0.01 * dense.std().item(), rel=0.05)
    assert not torch.equal(copies[0], copies[1])
    assert torch.equal(copies[1], upcycled(name, dense, 1, 0.01, seed=5))
    assert not torch.equal(copies[1], upcycled(name, dense, 1, 0.01, seed=6))
    assert not torch.equal(copies[1], upcycled(name.replace("up", "gate"), dense, 1, 0.01, seed=5))
    assert upcycled(name, dense.bfloat16(), 1, 0.01, seed=5).dtype == torch.bfloat16


def test_a_constant_tensor_stays_constant_under_noise() -> None:
    assert torch.equal(upcycled("x", torch.zeros(8), 0, 0.5, seed=0), torch.zeros(8))


def test_the_map_says_where_every_tensor_comes_from() -> None:
    dense = [name for name, _ in built(DENSE).named_parameters()]
    assert source_of("vision.blocks.1.norm1.weight", dense) == Copy("vision.blocks.1.norm1.weight")
    assert source_of("vision.blocks.1.mlp.experts.up", dense) == Experts("vision.blocks.1.mlp.up.weight")
    assert source_of("vision.blocks.1.mlp.experts.down_bias", dense) == Experts("vision.blocks.1.mlp.down.bias")
    assert source_of("decoder.blocks.0.mlp.experts.gate", dense) == Experts("decoder.blocks.0.mlp.gate.weight")
    assert source_of("connector.mlp.experts.up_bias", dense) == Experts("connector.mlp.up.bias")
    assert source_of("connector.mlp.router.weight", dense) == Fresh()
    assert source_of("connector.mlp.shared.up.bias", dense) == Shared("connector.mlp.up.bias")
    assert source_of("decoder.blocks.0.mlp.shared.down.weight", dense) == Shared("decoder.blocks.0.mlp.down.weight")
    assert source_of("decoder.blocks.7.mlp.shared.down.weight", dense) == Fresh()
    assert source_of("decoder.blocks.7.mlp.experts.gate", dense) == Fresh()
    already = [name for name, _ in built(sparse(DENSE, "decoder")).named_parameters()]
    assert source_of("decoder.blocks.0.mlp.experts.gate", already) == Copy("decoder.blocks.0.mlp.experts.gate")
    assert source_of("decoder.blocks.0.mlp.router.weight", already) == Copy("decoder.blocks.0.mlp.router.weight")
