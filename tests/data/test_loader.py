import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.schema import Eval, LossWeights, Recipe, Source
from mmtrain.config.tokens import TokenKind
from mmtrain.data.loader import Loader, check_sources
from mmtrain.data.record import Batch
from tests.data.inputs import tokenizer
from tests.data.streams import CAPTIONS, make, packs, steps


def test_packs_do_not_depend_on_ranks_micro_batches_or_workers(folder: Path) -> None:
    expected = steps(make(folder))
    for size, micro, workers in [(1, 2, 2), (2, 1, 0), (4, 2, 1), (8, 1, 0)]:
        ranks = [steps(make(folder, micro_batch=micro, workers=workers), rank, size) for rank in range(size)]
        for number, whole in enumerate(expected):
            parts = [ranks[rank][number] for rank in range(size)]
            dealt = [packs(part) for part in parts]
            together = [dealt[number % size][number // size] for number in range(8)]
            assert together == packs(whole)
            assert {len(part.micro_batches) for part in parts} == {8 // size // micro}
            assert all(part.cursor == whole.cursor and part.served == whole.served for part in parts)
            assert sum(part.label_weight for part in parts) == whole.label_weight
            for name, total in whole.valid_tokens.items():
                assert sum(part.valid_tokens[name] for part in parts) == total


def test_resume_on_other_ranks_is_the_undisturbed_stream(folder: Path) -> None:
    expected = steps(make(folder))
    for stop, size in [(1, 2), (3, 4), (4, 1)]:
        cursor = json.loads(json.dumps(expected[stop - 1].cursor))
        rest = [steps(make(folder), rank, size, cursor=cursor) for rank in range(size)]
        assert [len(rank) for rank in rest] == [5 - stop] * size
        for number, whole in enumerate(expected[stop:]):
            dealt = [packs(rank[number]) for rank in rest]
            assert [dealt[n % size][n // size] for n in range(8)] == packs(whole)


@pytest.mark.parametrize("batch", [4, 16])
def test_another_batch_size_goes_on_with_the_next_pack(folder: Path, batch: int) -> None:
    one_epoch = {"steps": 0, "epochs": 1.0}
    before = steps(make(folder, one_epoch))
    left = [pack for step in before[1:] for pack in packs(step) if pack["keys"]]
    cursor = json.loads(json.dumps(before[0].cursor))
    changed = make(folder, one_epoch, global_batch=batch)
    rest = steps(changed, cursor=cursor)
    assert [pack for step in rest for pack in packs(step) if pack["keys"]] == left
    assert [step.cursor["steps"] for step in rest] == list(range(2, 2 + len(rest)))
    again = steps(changed, cursor=rest[0].cursor)
    assert list(map(packs, again)) == list(map(packs, rest[1:]))
    assert len(steps(replace(changed, steps=3), cursor=cursor)) == 2


def test_sums_are_those_of_the_batches(folder: Path) -> None:
    made = make(folder, micro_batch=4)
    vision = made.model.vision
    served = Counter()
    for step in steps(made):
        batches = step.micro_batches
        for batch in batches:
            served.update(batch.source_ids[batch.document_ids >= 0].tolist())
        assert step.served == {"captions": served[0], "text": served[2]}
        images = sum(int(batch.image_valid.sum()) for batch in batches)
        assert step.label_weight == sum(float(batch.weights.sum()) for batch in batches) > 0
        assert step.valid_tokens == {
            "vision": images * (2 * 3 + vision.class_token),
            "connector": images * made.model.connector.num_tokens,
            "decoder": sum(int((batch.document_ids >= 0).sum()) for batch in batches),
        }
        assert step.pack_keys == [keys for batch in batches for keys in batch.keys]
        assert all(batch.num_sources == 3 for batch in batches)
        assert {int(n) for batch in batches for n in batch.source_ids.unique()} <= {0, 2}


def check_batch(batch: Batch, made: Recipe) -> None:
    """What every batch must hold, whatever is in it."""
    length = made.data.sequence_length
    valid = batch.document_ids >= 0
    assert torch.equal(valid, batch.kind != TokenKind.PADDING)
    assert not batch.weights[~valid].any()
    slots = batch.image_slots[batch.image_valid]
    assert torch.equal(slots.flatten().sort().values, (batch.kind.flatten() == TokenKind.IMAGE).nonzero().flatten())
    for row in range(len(batch.tokens)):
        ids, at = batch.document_ids[row], batch.positions[row]
        for t in range(length - 1):
            if batch.weights[row, t]:
                assert ids[t] == ids[t + 1] and batch.labels[row, t] == batch.tokens[row, t + 1]
            if ids[t] >= 0 and ids[t] == ids[t + 1]:
                assert at[t + 1] == at[t] + 1
            elif ids[t + 1] >= 0:
                assert at[t + 1] == 0


def test_every_batch_keeps_its_promises(folder: Path) -> None:
    made = make(folder, micro_batch=4)
    for step in steps(made)[:2]:
        for batch in step.micro_batches:
            check_batch(batch, made)


def test_an_epoch_reads_every_sample_once_and_all_ranks_do_as_many_steps(folder: Path) -> None:
    sources = {"captions": Source(str(folder / "captions"))}
    made = make(folder, {"steps": 0, "epochs": 2.0}, sources=sources)
    ranks = [steps(made, rank, 4) for rank in range(4)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) == Loader.steps_for_epochs(made, tokenizer())
    keys = Counter(key for rank in ranks for step in rank for pack in step.pack_keys for key in pack)
    assert keys == Counter({f"c{n}": 2 for n in range(CAPTIONS)})
    for rank in ranks:
        for step in rank:
            for batch in step.micro_batches:
                check_batch(batch, made)


def test_steps_that_the_capped_sources_cannot_fill_are_an_error(folder: Path) -> None:
    sources = {"captions": Source(str(folder / "captions"), 1.0, max_epochs=1.5)}
    made = make(folder, {"steps": 40}, sources=sources)
    keys: Counter = Counter()
    with (
        pytest.raises(
            DataError, match=r"has given its max_epochs after \d+ of steps=40; lower steps, or raise data.so"
        ),
        Loader(made, tokenizer(), 0, 1) as loader,
    ):
        for step in loader:
            keys.update(key for pack in step.pack_keys for key in pack)
    assert sum(keys.values()) == 1.5 * CAPTIONS and set(keys.values()) == {1, 2}


def test_a_finite_run_pads_with_empty_packs(folder: Path) -> None:
    made = make(folder, workers=1)
    held_out = {"captions": made.data.sources["captions"]}
    ranks = [steps(made, rank, 2, sources=held_out, finite_batches=6) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [6, 6]
    keys = Counter(key for rank in ranks for step in rank for pack in step.pack_keys for key in pack)
    assert keys == Counter({f"c{n}": 1 for n in range(CAPTIONS)})
    last = ranks[0][-1]
    assert last.label_weight == 0 and last.valid_tokens == {"vision": 0, "connector": 0, "decoder": 0}
    assert all(batch.images.shape[0] == 1 and not batch.image_valid.any() for batch in last.micro_batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_text_after_an_image_counts_as_the_recipe_says_in_training_alone(folder: Path, workers: int) -> None:
    plain, weighted = make(folder), make(folder, workers=workers, loss_weights=LossWeights(3.0, 0.5))
    factors = set()
    for step, twin in zip(steps(weighted), steps(plain), strict=True):
        for batch, even in zip(step.micro_batches, twin.micro_batches, strict=True):
            assert batch.labels.equal(even.labels) and batch.tokens.equal(even.tokens)
            factors |= set(batch.weights[even.weights > 0].tolist())
            assert not batch.weights[even.weights == 0].any()
        assert step.label_weight == sum(float(batch.weights.sum()) for batch in step.micro_batches)
    assert factors == {3.0, 0.5}
    held_out = {"captions": Source(str(folder / "captions"))}
    measured = [steps(recipe, sources=held_out, finite_batches=2) for recipe in (weighted, plain)]
    assert [packs(step) for step in measured[0]] == [packs(step) for step in measured[1]]


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"lanes": 3}, 1, "data.lanes=3 does not divide data.global_batch=8; lanes that fit: 1, 2, 4, 8"),
        ({}, 3, "the data size 3 does not divide the 8 lanes of the stream"),
        ({"lanes": 4}, 8, "data sizes that fit: 1, 2, 4"),
        ({"micro_batch": 4}, 4, "data.global_batch=8 is not a multiple of data.micro_batch=4 x data size 4 = 16"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(folder: Path, changes: dict, size: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Loader(make(folder, **changes), tokenizer(), 0, size)
    assert words in str(caught.value)


def test_folders_are_looked_at_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    made = make(folder)
    check_sources(made, tokenizer())  # `off` has no weight: its folder need not be there
    gone = {"held": Source(str(tmp_path / "gone"))}
    check_sources(replace(made, eval=Eval(every=0, sources=gone)), tokenizer())
    with pytest.raises(DataError, match=r"data folder .*gone: no such folder"):
        check_sources(replace(made, eval=Eval(every=1, sources=gone)), tokenizer())
    with pytest.raises(DataError, match="indexed for tokenizer"):
        check_sources(made, tokenizer("chatml"))


def test_lanes_keep_their_packs_on_every_number_of_ranks(folder: Path) -> None:
    whole = packs(steps(make(folder, lanes=2))[0])
    for rank in range(2):
        assert packs(steps(make(folder, lanes=2), rank, 2)[0]) == whole[rank::2]
