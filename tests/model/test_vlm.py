"""The whole model: splicing, blank images, one loss however the batch is split, recomputation, generation."""

from dataclasses import replace

import pytest
import torch

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Model
from mmtrain.model.attention import KVCache
from mmtrain.model.stepio import Losses, StepInputs, first_inputs, sparse_layers
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.roles import Scales
from tests.model.small import ALL_PARTS, DENSE, SPARSE, Micro, built, fill, micro, sparse

SPARSE_MODEL = sparse(DENSE, *ALL_PARTS)
PACKS = [[("it", 1), ("tit", 2)], [("itit", 3), ("t", 4)]]
LENGTH = 26


def step_inputs(model: Model, batch: Micro) -> StepInputs:
    """Inputs whose constants are those of this one batch, with uneven load shares."""
    images = int(batch.image_valid.sum())
    rows, columns = model.vision.grid()
    valid = {
        "vision": images * (rows * columns + 1),
        "connector": images * model.connector.num_tokens,
        "decoder": int((batch.document_ids >= 0).sum()),
    }
    inputs = first_inputs(model, float(batch.weights.sum()), valid)
    for router in inputs.routers.values():
        router.load_share.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]).expand_as(router.load_share))
    return inputs


def gradients(net: VisionLanguageModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("model", [DENSE, SPARSE_MODEL], ids=["dense", "sparse"])
def test_losses_add_up(model: Model) -> None:
    net, batch = built(model), micro(model, PACKS, LENGTH)
    inputs = step_inputs(model, batch)
    losses = net(batch, inputs)
    assert isinstance(losses, Losses)
    want = losses.language_sum / batch.weights.sum()
    for part in losses.balance:
        want = want + 0.1 * losses.balance[part] + 0.01 * losses.z[part]
    torch.testing.assert_close(losses.total, want)
    torch.testing.assert_close(losses.by_source_sum.sum(), losses.language_sum.detach())
    torch.testing.assert_close(losses.weight_sum, batch.weights.sum())
    for source in range(2):
        torch.testing.assert_close(losses.by_source_weight[source], batch.weights[batch.source_ids == source].sum())
    assert set(losses.balance) == set(losses.z) == set(losses.counts) == (set(ALL_PARTS) if model != DENSE else set())
    for part, counts in losses.counts.items():
        assert counts.shape == (sparse_layers(model)[part], 4)
        assert (counts.sum(1) == 2 * inputs.routers[part].valid_total).all()


def test_every_sparse_layer_gets_its_own_router_state() -> None:
    model = sparse(DENSE, *ALL_PARTS, moe=replace(SPARSE, balance="bias"))
    batch = micro(model, PACKS, LENGTH)
    inputs = step_inputs(model, batch)
    for router in inputs.routers.values():
        for layer in range(router.bias.shape[0]):
            router.bias[layer, layer] = -1e4  # layer l never chooses expert l
    for counts in built(model)(batch, inputs).counts.values():
        assert torch.equal((counts == 0).nonzero(), torch.arange(len(counts)).unsqueeze(1).expand(-1, 2))


def test_only_the_total_carries_a_graph() -> None:
    net, batch = built(SPARSE_MODEL), micro(SPARSE_MODEL, PACKS, LENGTH)
    total, *others = net(batch, step_inputs(SPARSE_MODEL, batch))
    assert total.requires_grad
    for value in others:
        assert not any(tensor.requires_grad for tensor in (value.values() if isinstance(value, dict) else [value]))


def test_bf16_weights_give_nearly_the_same_loss_and_finite_gradients() -> None:
    batch = micro(DENSE, PACKS, LENGTH)
    inputs = step_inputs(DENSE, batch)
    want = built(DENSE)(batch, inputs).total.item()
    for model in (DENSE, SPARSE_MODEL):
        net = built(model).bfloat16()
        losses = net(batch, step_inputs(model, batch))
        losses.total.backward()
        assert losses.total.dtype == torch.float32
        assert all(torch.isfinite(gradient).all() for gradient in gradients(net).values())
        if model is DENSE:
            assert losses.total.item() == pytest.approx(want, rel=1e-2)


def test_the_loss_is_cross_entropy_of_the_logits() -> None:
    net, batch = built(SPARSE_MODEL), micro(SPARSE_MODEL, PACKS, LENGTH)
    inputs = step_inputs(SPARSE_MODEL, batch)
    logits = net(batch, inputs, logits_at=torch.arange(2 * LENGTH))
    assert logits.shape == (2 * LENGTH, 100)
    ce = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    torch.testing.assert_close(net(batch, inputs).language_sum, (ce * batch.weights.flatten()).sum())
    some = torch.tensor([7, 3])
    torch.testing.assert_close(net(batch, inputs, logits_at=some), logits[some])


@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_a_batch_split_into_micro_batches_gives_the_same_sums_and_gradients(scope: str) -> None:
    model = sparse(DENSE, *ALL_PARTS, moe=replace(SPARSE, balance_scope=scope))
    packs = [*PACKS, [("t", 5), ("tt", 6)], [("ii", 7)]]  # the third has no image, so it comes with a blank one
    whole = micro(model, packs, LENGTH)
    inputs = step_inputs(model, whole)
    net = built(model)
    together = net(whole, inputs)
    together.total.backward()
    want = gradients(net)
    net.zero_grad(set_to_none=True)
    order = [2, 0, 3, 1]
    parts = [net(micro(model, [packs[i]], LENGTH), inputs) for i in order]
    for part in parts:
        part.total.backward()
    torch.testing.assert_close(sum(part.total for part in parts), together.total)
    torch.testing.assert_close(sum(part.by_source_sum for part in parts), together.by_source_sum)
    for name in ALL_PARTS:
        torch.testing.assert_close(sum(part.z[name] for part in parts), together.z[name])
        torch.testing.assert_close(sum(part.counts[name] for part in parts), together.counts[name])
    assert_same_gradients(gradients(net), want)


@pytest.mark.parametrize("kind", ["c_abstractor", "avg_pool", "attention_pool", "mlp"])
@pytest.mark.parametrize("experts", [False, True])
def test_without_images_the_towers_get_zero_gradients_not_none(kind: str, experts: bool) -> None:
    tokens = 12 if kind == "mlp" else 4
    model = replace(DENSE, connector=replace(DENSE.connector, kind=kind, num_tokens=tokens))
    model = sparse(model, *ALL_PARTS) if experts else model
    net, batch = built(model), micro(model, [[("t", 1), ("tt", 2)]], LENGTH)
    net(batch, step_inputs(model, batch)).total.backward()
    for name, gradient in gradients(net).items():
        assert gradient is not None, name
        if not name.startswith("decoder."):
            assert (gradient == 0).all(), name


def test_a_blank_image_has_no_influence() -> None:
    net, batch = built(SPARSE_MODEL), micro(SPARSE_MODEL, PACKS, LENGTH)
    inputs = step_inputs(SPARSE_MODEL, batch)
    losses = net(batch, inputs)
    losses.total.backward()
    want = gradients(net)
    net.zero_grad(set_to_none=True)
    noise = torch.randint(0, 256, (2, *batch.images.shape[1:]), dtype=torch.uint8)
    batch.images = torch.cat((noise[:1], batch.images, noise[1:]))
    batch.image_valid = torch.tensor([False, *batch.image_valid.tolist(), False])
    absent = torch.full((1, batch.image_slots.shape[1]), -1)
    batch.image_slots = torch.cat((absent, batch.image_slots, absent))
    again = net(batch, inputs)
    again.total.backward()
    torch.testing.assert_close(again.total, losses.total, rtol=1e-6, atol=0)
    for part in ALL_PARTS:
        assert torch.equal(again.counts[part], losses.counts[part])
    assert_same_gradients(gradients(net), want)


def test_images_matter_and_land_in_their_own_document() -> None:
    net, batch = built(DENSE), micro(DENSE, PACKS, LENGTH)
    inputs = first_inputs(DENSE)
    at = torch.arange(2 * LENGTH)
    before = net(batch, inputs, logits_at=at).view(2, LENGTH, -1)
    batch.images[1] = 255 - batch.images[1]  # the picture of the second document of the first pack
    after = net(batch, inputs, logits_at=at).view(2, LENGTH, -1)
    changed = (before - after).abs().amax(-1) > 1e-6
    own = torch.zeros(2, LENGTH, dtype=torch.bool)
    first = int(batch.image_slots[1, 0])
    own[0, first:] = batch.document_ids[0, first:] == 1
    assert torch.equal(changed, own)


def test_an_image_in_several_places_is_that_many_equal_images() -> None:
    net, batch = built(DENSE), micro(DENSE, [[("it", 1)], [("t", 2), ("it", 3)], [("it", 4)]], 10)
    inputs, at = first_inputs(DENSE), torch.arange(30)
    batch.images[2] = batch.images[0]
    want = net(batch, inputs, logits_at=at)
    absent = torch.full_like(batch.image_slots[1], -1)
    batch.image_slots = torch.stack(
        (torch.cat((batch.image_slots[0], batch.image_slots[2])), torch.cat((absent, batch.image_slots[1])))
    )
    batch.images, batch.image_valid = batch.images[:2], batch.image_valid[:2]
    torch.testing.assert_close(net(batch, inputs, logits_at=at), want)


def test_the_embedding_factor_is_for_tokens_and_not_for_images() -> None:
    scales = Scales(embedding=3.0)
    plain, scaled = built(DENSE), fill(VisionLanguageModel(DENSE, scales))
    with torch.no_grad():
        scaled.decoder.embedding.weight /= 3.0
    batch, at = micro(DENSE, PACKS, LENGTH), torch.arange(2 * LENGTH)
    inputs = first_inputs(DENSE)
    torch.testing.assert_close(scaled(batch, inputs, logits_at=at), plain(batch, inputs, logits_at=at))
    batch.images = batch.images[:0]  # a step of generation: text alone, no tower runs
    batch.kind.fill_(1)
    torch.testing.assert_close(scaled(batch, inputs, logits_at=at), plain(batch, inputs, logits_at=at))


def test_a_placeholder_too_many_names_the_sample_and_both_counts() -> None:
    net, batch = built(DENSE), micro(DENSE, PACKS, LENGTH)
    text = (batch.kind[1] == 1).nonzero()[0]
    batch.kind[1, text] = 2
    message = (
        "sample 'itit-3' (pack 1 of the micro-batch) has 9 image placeholders, but its images bring 8 tokens: every "
        "image is 4 placeholders; rebuild its shard's index, or leave the sample out"
    )
    with pytest.raises(DataError) as caught:
        net(batch, first_inputs(DENSE))
    assert str(caught.value) == message


def test_a_missing_image_names_the_sample_and_both_counts() -> None:
    net, batch = built(DENSE), micro(DENSE, PACKS, LENGTH)
    batch.image_valid[1] = False
    with pytest.raises(DataError, match=r"sample 'tit-2' \(pack 0 .*has 4 image placeholders, .*bring 0 tokens"):
        net(batch, first_inputs(DENSE))


def test_two_images_in_one_slot_and_slots_in_padding_are_found() -> None:
    net, batch = built(DENSE), micro(DENSE, PACKS, LENGTH)
    batch.image_slots[0] = batch.image_slots[1]
    with pytest.raises(DataError, match=r"sample 'it-1' .*has 4 image placeholders, .*bring 0 tokens"):
        net(batch, first_inputs(DENSE))
    batch = micro(DENSE, PACKS, LENGTH)
    batch.kind[0] = 0
    batch.document_ids[0] = -1
    with pytest.raises(DataError, match=r"sample '\(padding\)' .*has 0 image placeholders, .*bring 8 tokens"):
        net(batch, first_inputs(DENSE))


def test_slots_of_another_recipe_are_refused() -> None:
    net, batch = built(DENSE), micro(DENSE, PACKS, LENGTH)
    batch.image_slots = batch.image_slots[:, :3]
    with pytest.raises(DataError, match="has 3 slots for each image, but the connector makes 4 tokens of an image"):
        net(batch, first_inputs(DENSE))


def test_recomputing_activations_changes_nothing() -> None:
    batch = micro(SPARSE_MODEL, PACKS, LENGTH)
    results = []
    for recompute in (False, True):
        net = built(SPARSE_MODEL, checkpoint_activations=recompute)
        losses = net(batch, step_inputs(SPARSE_MODEL, batch))
        losses.total.backward()
        results.append((losses, gradients(net)))
    assert torch.equal(results[0][0].total, results[1][0].total)
    for name, want in results[0][1].items():
        assert torch.equal(results[1][1][name], want), name


def test_recomputation_really_happens() -> None:
    batch = micro(DENSE, PACKS, LENGTH)
    calls = []
    for recompute in (False, True):
        net = built(DENSE, checkpoint_activations=recompute)
        count = [0]
        for module in (*net.vision.blocks, *net.decoder.blocks):
            module.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        net(batch, step_inputs(DENSE, batch)).total.backward()
        calls.append(count[0])
    assert calls[1] == 2 * calls[0]


def test_greedy_decoding_with_the_cache_is_the_whole_forward_each_time() -> None:
    net, inputs = built(SPARSE_MODEL), first_inputs(SPARSE_MODEL)
    batch = micro(SPARSE_MODEL, [[("itt", 1)], [("t", 2)]], 10)  # the second prompt is 3 long, padded on the right
    lengths = (batch.document_ids == 0).sum(1)
    cache = KVCache(SPARSE_MODEL.decoder.num_layers, 15)
    with torch.no_grad():
        rows = torch.arange(2) * 10
        step, found = batch, []
        logits = net(step, inputs, logits_at=rows + lengths - 1, cache=cache)
        for count in range(5):
            found.append(logits.argmax(-1))
            token = found[-1].unsqueeze(1)
            step = replace(
                batch,
                tokens=token,
                document_ids=torch.zeros_like(token),
                positions=lengths.unsqueeze(1) + count,
                kind=torch.ones_like(token),
                images=batch.images[:0],
            )
            logits = net(step, inputs, logits_at=torch.arange(2), cache=cache)
        for row, layout in enumerate(("itt", "t")):
            prompt = micro(SPARSE_MODEL, [[(layout, row + 1)]], int(lengths[row]))
            for token in torch.stack(found)[:, row].tolist():
                length = prompt.tokens.shape[1]
                assert net(prompt, inputs, logits_at=torch.tensor([length - 1])).argmax().item() == token
                grown = {"tokens": token, "kind": 1, "document_ids": 0, "positions": length}
                for name, value in grown.items():
                    old = getattr(prompt, name)
                    setattr(prompt, name, torch.cat((old, old.new_tensor([[value]])), 1))


def test_every_parameter_is_named_as_agreed_and_has_a_role() -> None:
    names = set()
    for model in (DENSE, SPARSE_MODEL):
        with torch.device("meta"):
            net = VisionLanguageModel(model)
        for name, parameter in net.named_parameters():
            assert parameter.is_meta and parameter.role is not None
            names.add(name)
    agreed = {
        "vision.patch.weight",
        "vision.class_token",
        "vision.positions",
        "vision.pre_norm.bias",
        "vision.blocks.2.norm1.weight",
        "vision.blocks.0.attention.q.bias",
        "vision.blocks.0.attention.out.weight",
        "vision.blocks.0.mlp.up.bias",
        "vision.blocks.0.mlp.router.weight",
        "vision.blocks.0.mlp.experts.down_bias",
        "connector.mlp.up.weight",
        "connector.mlp.experts.up_bias",
        "decoder.embedding.weight",
        "decoder.blocks.1.norm2.weight",
        "decoder.blocks.0.attention.k.weight",
        "decoder.blocks.0.mlp.gate.weight",
        "decoder.blocks.0.mlp.experts.gate",
        "decoder.norm.weight",
        "decoder.head.weight",
    }
    assert agreed <= names


def test_a_tied_head_is_the_embedding() -> None:
    net = built(replace(DENSE, decoder=replace(DENSE.decoder, tied=True)))
    assert net.decoder.head.weight is net.decoder.embedding.weight
    names = [name for name, _ in net.named_parameters()]
    assert "decoder.embedding.weight" in names and "decoder.head.weight" not in names


def test_building_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    VisionLanguageModel(SPARSE_MODEL)
    assert torch.equal(torch.get_rng_state(), before)
