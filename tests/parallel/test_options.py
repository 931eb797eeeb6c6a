"""What the parity recipe leaves out: tied embeddings and an attention-pool connector on tensor ranks, offload, texts of
any length on tensor ranks that share positions."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmtrain.config.schema import Connector, Parallel, Recipe
from mmtrain.data.record import Batch
from mmtrain.model.attention import KVCache
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.registry import Registry
from mmtrain.parallel.groups import connect
from mmtrain.parallel.materialize import fill
from mmtrain.parallel.tensor import shard
from mmtrain.parallel.zero_state import FlatState, Shard
from tests import dist, tiny
from tests.parallel import compare, harness
from tests.parallel.compare import TOLERANCE, distance

pytestmark = pytest.mark.timeout(360)


def tied_with_attention_pool() -> Recipe:
    recipe = tiny.recipe()
    base = recipe.mup.base | {"connector": {"hidden_size": 12, "num_heads": 2}}
    pool = Connector(kind="attention_pool", num_tokens=4, hidden_size=24, num_heads=4, moe=recipe.model.connector.moe)
    decoder = replace(recipe.model.decoder, tied=True)
    return replace(
        recipe, model=replace(recipe.model, connector=pool, decoder=decoder), mup=replace(recipe.mup, base=base)
    )


def filled(recipe: Recipe, registry: Registry) -> VisionLanguageModel:
    """The model whole, without any of parallel/: what the cut one must equal."""
    model, _ = harness.parts_of(recipe)
    model.to_empty(device="cpu")
    model.decoder.head.weight = model.decoder.embedding.weight  # to_empty parts what is tied
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = harness.start_values(registry, name)
            parameter.zero_()[: len(value)] = value  # the rest pads the vocabulary
    return model


def gradients_on_tensor_ranks() -> dict[str, object]:
    """On a rank: the loss of both models, and by parameter how far the cut one's gradient is from its box's."""
    groups = connect(Parallel(tensor=2))
    recipe = tied_with_attention_pool()
    cut, registry = harness.parts_of(recipe)
    layout = shard(cut, groups)
    fill(cut, layout, lambda name, box: harness.start_values(registry, name)[box.slices()], groups.device)
    whole = filled(recipe, registry)
    packs = tiny.packs(recipe.model, 0)
    batch, inputs = tiny.collate(recipe.model, packs), harness.inputs_of(recipe, packs)
    losses = [model(batch, inputs) for model in (cut, whole)]
    for one in losses:
        one.total.backward()
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    largest = max(float(grad.norm()) for grad in wanted.values())
    far, rounding = {}, []
    for name, parameter in cut.named_parameters():
        real = layout[name].real
        mine = parameter.grad[tuple(slice(0, side) for side in real.shape)]
        if float(wanted[name].norm()) < 1e-6 * largest:
            rounding.append(name)
        else:
            far[name] = distance(mine, wanted[name][real.slices()])
    split = [name for name, parameter in cut.named_parameters() if parameter.tensor_cut]
    groups.close()
    return {"losses": [float(one.total) for one in losses], "far": far, "rounding": rounding, "split": split}


def test_a_tied_embedding_and_an_attention_pool_on_two_tensor_ranks_equal_one_process() -> None:
    for found in dist.run(gradients_on_tensor_ranks, 2):
        mine, wanted = found["losses"]
        assert mine == pytest.approx(wanted, rel=TOLERANCE)
        assert max(found["far"].values()) <= TOLERANCE, max(found["far"].items(), key=lambda item: item[1])
        assert all(name.endswith("k.bias") for name in found["rounding"])  # they shift all scores of a query alike
        assert "decoder.embedding.weight" in found["split"] and "decoder.head.weight" not in found["far"]
        assert any(name.startswith("connector.") and ".q." in name for name in found["split"])


def train_offloaded(steps: int) -> dict[int, float]:
    """ZeRO stage -> the largest distance of any parameter or moment from the same training without offload."""
    groups = connect(Parallel(zero_stage=1))
    worst = {}
    for stage in (1, 2, 3):
        kept, offloaded = (
            harness.train(tiny.recipe("adamw", Parallel(zero_stage=stage, offload_optimizer=offload)), groups, steps)
            for offload in (False, True)
        )
        assert kept.norms == pytest.approx(offloaded.norms, rel=TOLERANCE)
        pairs = [(kept.state[-1][key].values, offloaded.state[-1][key].values) for key in kept.state[-1]]
        assert kept.state[-1].keys() == offloaded.state[-1].keys()
        worst[stage] = max(distance(a, b) for a, b in pairs if float(a.norm()) > 1e-12)
    groups.close()
    return worst


def test_an_optimizer_in_host_memory_takes_the_same_steps() -> None:
    (worst,) = dist.run(train_offloaded, 1, 3)
    assert set(worst) == {1, 2, 3} and max(worst.values()) <= TOLERANCE, worst


def read_in_three_ways() -> dict[str, torch.Tensor | str]:
    """On a rank: logits of a pack read whole, up to an odd position, and from there on with a cache."""
    groups = connect(Parallel(tensor=2))
    recipe = tiny.recipe("adamw", Parallel(tensor=2, sequence_parallel=True))
    engine = harness.build(recipe, groups)
    packs = tiny.packs(recipe.model, 0)[:1]
    batch, inputs = tiny.collate(recipe.model, packs), harness.inputs_of(recipe, packs)
    last = odd_length()
    cache = KVCache(recipe.model.decoder.num_layers, tiny.SEQUENCE)
    one = torch.zeros(1, dtype=torch.int64)
    logits = {
        "whole": engine.evaluate(batch, inputs, torch.arange(tiny.SEQUENCE)),
        "odd": engine.evaluate(cut(batch, 0, last), inputs, torch.arange(last)),
        "prompt": engine.evaluate(cut(batch, 0, last), inputs, torch.arange(last), cache),
        "next": engine.evaluate(cut(batch, last, last + 1), inputs, one, cache),
    }
    try:
        engine.forward(cut(batch, 0, last), inputs)
    except ValueError as error:
        logits["refused"] = str(error)
    groups.close()
    return logits


def odd_length() -> int:
    """The last odd length of the pack that ends within a document."""
    ids = tiny.packs(tiny.recipe().model, 0)[0].document_ids
    return max(at for at in range(1, tiny.SEQUENCE, 2) if ids[at] == ids[at - 1] >= 0)


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Positions start .. stop - 1 of a batch of one pack; its images when it starts with them."""
    fields = ("tokens", "labels", "weights", "document_ids", "positions", "kind", "source_ids")
    kept = batch.images.shape[0] if start == 0 else 0
    images = {name: getattr(batch, name)[:kept] for name in ("images", "image_valid", "image_slots")}
    return replace(batch, **{name: getattr(batch, name)[:, start:stop] for name in fields}, **images)


def test_tensor_ranks_that_share_positions_read_texts_of_any_length_and_position_by_position() -> None:
    found = dist.run(read_in_three_ways, 2)
    wanted = compare.reference_logits(tiny.recipe(), 0)[: tiny.SEQUENCE]
    for rank in found:
        assert distance(rank["whole"], wanted) <= TOLERANCE
        for way in ("odd", "prompt"):
            assert distance(rank[way], wanted[: odd_length()]) <= TOLERANCE
        assert distance(rank["next"], wanted[odd_length() : odd_length() + 1]) <= TOLERANCE
        assert (
            rank["refused"] == f"2 tensor ranks cannot share {odd_length()} positions: the recipe's check was not run"
        )


def test_offloaded_gradients_are_read_when_their_copies_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: DeepSpeed's optimizer is a stand-in whose copies arrive when they are waited for."""
    holder = torch.zeros(3)
    holder.grad = torch.zeros(3)
    optimizer = SimpleNamespace(_wait_for_offload_copies=lambda: holder.grad.fill_(2.0))
    state = FlatState(optimizer, {}, offload=True)
    monkeypatch.setattr(state, "shards", lambda: [Shard("weight", 0, 3, holder, 0)])
    ((name, gradient),) = [(name, gradient.clone()) for name, gradient in state.gradients()]
    assert name == "weight" and gradient.tolist() == [2.0, 2.0, 2.0]
