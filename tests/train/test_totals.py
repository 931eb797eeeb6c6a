"""The numbers of a step against the textbook."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmtrain.config.schema import Model, Recipe
from mmtrain.config.tokens import TokenKind
from mmtrain.data.loader import Loader
from mmtrain.model.balance import RouterState
from mmtrain.model.stepio import Losses, sparse_layers
from mmtrain.run.guard import EXIT_REQUEUE, EXIT_STOPPED, exit_code
from mmtrain.totals import LossTotals, StepSums
from tests.data.inputs import tokenizer
from tests.train.tiny import KINDS, SPARSE, model, sparse_model


def alone(tensor_rank: int = 0) -> SimpleNamespace:
    """Stands for the groups of one process."""

    def same(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    return SimpleNamespace(tensor_rank=tensor_rank, device="cpu", sum_over_world=same, sum_over_data=same)


def test_sums_of_a_step(make: Callable[..., Recipe], tmp_path: Path) -> None:
    with Loader(make(tmp_path), tokenizer(), 0, 1) as loader:
        step = next(iter(loader))
    sums = StepSums.of(step, 2, alone(), step.micro_batches[0].num_sources)
    batches = step.micro_batches
    assert float(sums.label_weight) == sum(float(batch.weights.sum()) for batch in batches) > 0
    assert sums.labels == sum(int((batch.weights > 0).sum()) for batch in batches)
    assert sums.positions == 4 * 80
    assert sums.tokens == sum(int((batch.kind != int(TokenKind.PADDING)).sum()) for batch in batches) < 320
    images = sum(int(batch.image_valid.sum()) for batch in batches)
    assert sums.images == images > 0
    assert {part: float(value) for part, value in sums.valid_tokens.items()} == {
        "vision": images * (4 + 1),
        "connector": images * 4,
        "decoder": sums.tokens,
    }
    documents = {
        (number, row, document, source)
        for number, batch in enumerate(batches)
        for row in range(len(batch.tokens))
        for document, source in zip(batch.document_ids[row].tolist(), batch.source_ids[row].tolist(), strict=True)
        if document >= 0
    }
    assert sums.documents == [sum(key[3] == source for key in documents) for source in range(len(KINDS))]
    assert (sums.unusable, sums.stop) == (0, 2)
    assert StepSums.of(step, 0, alone(), step.micro_batches[0].num_sources).stop == 0


def test_of_tensor_ranks_one_counts_but_all_are_heard(make: Callable[..., Recipe], tmp_path: Path) -> None:
    with Loader(make(tmp_path), tokenizer(), 0, 1) as loader:
        step = next(iter(loader))
    second = StepSums.of(step, 1, alone(tensor_rank=1), step.micro_batches[0].num_sources)
    assert second.tokens == second.images == float(second.label_weight) == 0 and second.stop == 1


def test_every_stop_has_its_exit_code() -> None:
    assert [exit_code(code) for code in (1, 2, 3, 4)] == [EXIT_REQUEUE] * 3 + [EXIT_STOPPED]


def losses(shape: Model, seed: int) -> Losses:
    """Random reports of a micro-batch with two sources."""
    generator = torch.Generator().manual_seed(seed)
    layers = sparse_layers(shape)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator)

    by_source, weight = draw(2), draw(2)
    return Losses(
        total=draw(),
        language_sum=by_source.sum(),
        weight_sum=weight.sum(),
        by_source_sum=by_source,
        by_source_weight=weight,
        balance={part: draw() for part in layers},
        z={part: draw() for part in layers},
        counts={part: (10 * draw(count, 4)).floor() for part, count in layers.items()},
        probability={part: 5 * draw(count, 4) for part, count in layers.items()},
    )


def test_the_loss_is_the_textbooks() -> None:
    shape = sparse_model()
    micro = [losses(shape, seed) for seed in range(3)]
    totals = LossTotals(shape)
    for one in micro:
        totals.add(one)
    totals.reduce(alone())
    language = sum(float(one.language_sum) for one in micro) / sum(float(one.weight_sum) for one in micro)
    assert totals.language_loss() == pytest.approx(language, rel=1e-6)
    extra = 0.0
    for part in ("vision", "connector", "decoder"):
        moe = getattr(shape, part).moe
        extra += 0.0 if moe.balance == "bias" else 0.1 * sum(float(one.balance[part]) for one in micro)
        extra += 0.01 * sum(float(one.z[part]) for one in micro)
    assert totals.loss() == pytest.approx(language + extra, rel=1e-6)
    first = sum(float(one.by_source_sum[0]) for one in micro) / sum(float(one.by_source_weight[0]) for one in micro)
    assert totals.by_source(["a", "b"])["a"] == pytest.approx(first, rel=1e-6)


def test_a_source_without_labels_has_no_loss() -> None:
    totals = LossTotals(model())
    totals.add(
        losses(model(), 0)._replace(by_source_sum=torch.tensor([0.0, 2.0]), by_source_weight=torch.tensor([0.0, 4.0]))
    )
    totals.reduce(alone())
    assert totals.by_source(["a", "b"]) == {"b": 0.5} and totals.loss() == totals.language_loss() == 0.5


def test_shares_are_named_by_the_layer_of_the_part() -> None:
    shape = model(SPARSE, SPARSE, replace(SPARSE, every=2))
    shape = replace(shape, decoder=replace(shape.decoder, num_layers=4))
    totals = LossTotals(shape)
    report = losses(shape, 1)
    report.counts["decoder"] = torch.tensor([[1.0, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    totals.add(report)
    totals.reduce(alone())
    shares = totals.expert_shares()
    assert list(shares["vision"]) == ["0", "1"] and list(shares["connector"]) == ["0"]
    assert shares["decoder"] == {"1": [0.125, 0.125, 0.25, 0.5], "3": [0.0, 0.0, 0.0, 0.0]}
    assert all(shape.decoder.moe.is_sparse(int(layer)) for layer in shares["decoder"])


def test_the_switch_value_is_that_of_the_whole_step() -> None:
    """Of two micro-batches of unlike use together, by the formula of arXiv:2101.03961."""
    shape = sparse_model()
    totals = LossTotals(shape)
    for seed, used in ((1, [6.0, 2.0, 0.0, 0.0]), (2, [0.0, 0.0, 2.0, 6.0])):
        one = losses(shape, seed)
        one.counts["connector"] = torch.tensor([used])  # 4 tokens, each to 2 experts
        one.probability["connector"] = torch.tensor([[use / 2 for use in used]])
        one.counts["decoder"], one.probability["decoder"] = torch.zeros(2, 4), torch.zeros(2, 4)
        totals.add(one)
    totals.reduce(alone())
    value = totals.switch()
    assert value["connector"] == pytest.approx(4 * (2 * (6 / 16) * (3 / 8) + 2 * (2 / 16) * (1 / 8)))  # apart: 2.5
    assert value["decoder"] == 0.0  # no valid token
    counts, sums = (totals.sums[f"{kind}/vision"] for kind in ("counts", "probability"))
    by_hand = [4 * (c / c.sum() * p / p.sum()).sum() for c, p in zip(counts, sums, strict=True)]
    assert value["vision"] == pytest.approx(float(sum(by_hand)) / len(by_hand))


def test_router_state_follows_its_formula() -> None:
    shape = sparse_model()
    state = RouterState.first(shape)
    counts = {
        "vision": torch.tensor([[3.0, 1.0, 0.0, 4.0]]),
        "decoder": torch.tensor([[2.0, 6.0, 4.0, 4.0], [0.0] * 4]),
    }
    state.update(counts)
    assert state.shares["vision"].tolist() == [[0.375, 0.125, 0.0, 0.5]]
    assert state.shares["decoder"].tolist() == [[0.125, 0.375, 0.25, 0.25], [0.25] * 4]
    assert state.shares["connector"].tolist() == [[0.25] * 4]
    assert torch.equal(state.bias["vision"], torch.zeros(1, 4))  # balanced by a loss
    rate = torch.tensor(0.01)
    assert torch.equal(state.bias["decoder"], torch.stack([rate * torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.zeros(4)]))
    state.update(counts)
    assert torch.equal(state.bias["decoder"][0], 2 * rate * torch.tensor([1.0, -1.0, 0.0, 0.0]))


def test_router_state_survives_json_to_the_bit() -> None:
    shape = sparse_model()
    state = RouterState.first(shape)
    generator = torch.Generator().manual_seed(3)
    for part, old in state.shares.items():
        state.shares[part] = torch.rand(old.shape, generator=generator).double().float() / 3
        state.bias[part] = torch.randn(old.shape, generator=generator) / 7
    again = RouterState.first(shape)
    again.load(json.loads(json.dumps(state.as_json())))
    for part in state.shares:
        assert torch.equal(again.shares[part], state.shares[part]) and torch.equal(again.bias[part], state.bias[part])
        assert again.shares[part].dtype == torch.float32


def test_of_tensor_ranks_one_counts_but_a_nan_of_any_is_heard() -> None:
    shape = sparse_model()
    second = LossTotals(shape)
    second.add(losses(shape, 0))
    second.reduce(alone(tensor_rank=1))
    assert all(float(value.abs().sum()) == 0 for value in second.sums.values())
    broken = LossTotals(shape)
    broken.add(losses(shape, 0)._replace(by_source_sum=torch.tensor([1.0, torch.nan])))
    broken.reduce(alone(tensor_rank=1))
    assert torch.isnan(broken.sums["source_sum"]).tolist() == [False, True]
