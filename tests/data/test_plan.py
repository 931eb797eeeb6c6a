import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.schema import CURSOR_BYTES, Data
from mmtrain.config.seed import derive
from mmtrain.data.image import Canvas
from mmtrain.data.ordering import Planned, Sizer, SourceOrder, permutation
from mmtrain.data.plan import Planner
from tests.data.plans import IMAGE, IMAGE_TOKENS, SIZER, entry_of, names, read, room, source, text

DATA = Data(tokenizer="", sequence_length=40, max_images=4, global_batch=2, window=20, max_wait=40, open_shards=2)
SEGMENT = st.one_of(st.integers(1, 70).map(text), st.just(IMAGE))
DOCUMENT = st.one_of(
    st.integers(1, 30).map(lambda n: [text(n)]),
    st.integers(1, 20).map(lambda n: [IMAGE, text(n)]),
    st.lists(SEGMENT, min_size=1, max_size=12),
    st.none(),
)
SOURCE = st.lists(DOCUMENT, min_size=1, max_size=25).filter(any)
SOURCES = st.lists(SOURCE, min_size=1, max_size=3)
WEIGHTS = st.lists(st.floats(0.05, 1), min_size=3, max_size=3)


def planner(documents, weights, data=DATA, seed=0, passes=1):
    """A plan over lists of documents; `passes` epochs of each, None for ever."""
    shards = {f"s{n}": source(f"s{n}", rows) for n, rows in enumerate(documents)}
    limits = {name: passes * len(documents[n]) for n, name in enumerate(shards)} if passes else None
    return Planner(shards, data, seed, SIZER, dict(zip(shards, weights, strict=False)), limits, read=read)


def all_packs(plan: Planner) -> list[list[Planned]]:
    packs = []
    while not plan.finished:
        packs += plan.next_step().packs
    return packs


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SOURCES, WEIGHTS, st.integers(0, 3), st.integers(1, 2))
def test_every_sample_of_each_epoch_comes_once_and_budgets_hold(documents, weights, seed, passes) -> None:
    plan = planner(documents, weights, seed=seed, passes=passes)
    covered: Counter = Counter()
    skipped: Counter = Counter()
    while not plan.finished:
        step = plan.next_step()
        assert plan.longest_wait <= DATA.max_wait
        skipped.update(sample.key for sample in step.skipped)
        for pack in step.packs:
            assert sum(planned.tokens for planned in pack) <= DATA.sequence_length
            assert sum(planned.panels for planned in pack) <= DATA.max_images
            for planned in pack:
                entry = entry_of(planned)
                sizes = [room(segment)[0] for segment in entry.segments]
                cut = planned.cut
                for number in range(cut.first, cut.last + 1) if cut else range(len(sizes)):
                    start = cut.start if cut and number == cut.first else 0
                    stop = cut.stop if cut and number == cut.last else sizes[number]
                    covered.update((entry.key, number, token) for token in range(start, stop))
    expected = Counter(
        {
            (f"s{s}-{d}", number, token): passes
            for s, rows in enumerate(documents)
            for d, row in enumerate(rows)
            for number, segment in enumerate(row or ())
            for token in range(room(segment)[0])
        }
    )
    assert covered == expected
    broken = {f"s{s}-{d}": passes for s, rows in enumerate(documents) for d, row in enumerate(rows) if not row}
    assert skipped == Counter(broken)
    assert plan.next_step().packs == [[], []]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SOURCES, WEIGHTS, st.lists(st.integers(1, 6), max_size=5))
def test_a_restart_at_any_step_changes_nothing(documents, weights, stops) -> None:
    undisturbed = planner(documents, weights, passes=None)
    plan = planner(documents, weights, passes=None)
    for steps in [*stops, 3]:
        for _ in range(steps):
            step, twin = plan.next_step(), undisturbed.next_step()
            assert names(step.packs) == names(twin.packs)
            assert step.skipped == twin.skipped
        cursor = json.loads(json.dumps(plan.cursor()))
        assert cursor == undisturbed.cursor()
        plan = planner(documents, weights, passes=None)
        plan.restore(cursor)
        assert plan.served == undisturbed.served


@settings(max_examples=30, deadline=None)
@given(SOURCES, WEIGHTS)
def test_packs_do_not_depend_on_how_many_make_a_step(documents, weights) -> None:
    two = planner(documents, weights, passes=None)
    five = planner(documents, weights, replace(DATA, global_batch=5, lanes=1, micro_batch=5), passes=None)
    once = [pack for _ in range(10) for pack in names(two.next_step().packs)]
    assert once == [pack for _ in range(4) for pack in names(five.next_step().packs)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SOURCES, WEIGHTS, st.sampled_from([{}, {"max_images": 1}, {"max_wait": 20, "window": 5}]), st.integers(0, 9))
def test_no_stretch_of_packs_is_further_off_the_weights_than_proved(documents, weights, changes, seed) -> None:
    """Whatever the documents are, while no source has ended: mmtrain.data.plan has the proof."""
    data = replace(DATA, global_batch=1, lanes=1, micro_batch=1, **changes)
    plan = planner(documents, weights, data, seed, passes=None)
    shares = np.array(weights[: len(documents)]) / sum(weights[: len(documents)])
    served = []
    for _ in range(150):
        served.append(list(plan.served.values()))
        plan.next_step()
    off = np.array(served) - np.array(served).sum(1, keepdims=True) * shares
    bound = np.array(list(plan.mixture_bound().values()))
    assert (off.max(0) - off.min(0) <= bound + 1e-6).all()
    volume = (data.max_wait - 4 * len(documents) - 2) / 4
    most = (np.minimum(2, shares * volume) + shares * volume + 1) * data.sequence_length
    assert np.allclose(bound, (1 - shares) * most + shares * (most.sum() - most))


SHORT = [[IMAGE, text(n % 7 + 3)] for n in range(60)]
LONG = [[text(n % 9 + 2), IMAGE, text(n % 31 + 4)] for n in range(40)]
PLAIN = [[text(n % 23 + 5)] for n in range(50)]


@pytest.mark.parametrize("weights", [(0.45, 0.45, 0.1), (0.1, 0.2, 0.7), (1.0, 1.0, 1.0)])
def test_the_mixture_follows_the_weights_by_tokens(weights) -> None:
    plan = planner([SHORT, LONG, PLAIN], weights, replace(DATA, max_images=8), passes=None)
    before = {f"s{n}": 0 for n in range(3)}
    bound = 3 * 1.5 * DATA.sequence_length  # far less than proved: packs with overdue documents are rare
    for _ in range(4):
        for _ in range(100):
            plan.next_step()
        made = {name: plan.served[name] - before[name] for name in before}
        total = sum(made.values())
        for weight, name in zip(weights, before, strict=True):
            assert abs(made[name] - weight / sum(weights) * total) <= bound
        before = plan.served


@pytest.mark.parametrize(
    ("documents", "weights"),
    [
        # One-token documents would fill every gap that the long ones leave, far beyond their share.
        ([[[text(30)]] * 9, [[text(1)]] * 9], (0.95, 0.05)),
        # One document of the small source is all that it may have in 25 packs.
        ([[[text(4)]] * 30, [[text(40)]] * 5], (0.96, 0.04)),
    ],
)
def test_no_gap_and_no_patience_breaks_the_mixture(documents, weights) -> None:
    plan = planner(documents, weights, passes=None)
    for _ in range(200):
        plan.next_step()
    total = sum(plan.served.values())
    for weight, made in zip(weights, plan.served.values(), strict=True):
        assert abs(made - weight * total) <= 1.5 * DATA.sequence_length


def test_nothing_waits_too_long_where_the_mixture_cannot_be_had() -> None:
    """One image a pack is all that fits, so text would wait for ever to keep its share."""
    data = replace(DATA, sequence_length=80, max_images=1)
    plan = planner([[[IMAGE, text(1)]] * 9, [[text(20)]] * 9], (0.5, 0.5), data, passes=None)
    for _ in range(100):
        plan.next_step()
        assert plan.longest_wait <= data.max_wait


def test_packs_are_nearly_full() -> None:
    data = replace(DATA, sequence_length=128, max_images=16, max_wait=64, window=200)
    plan = planner([SHORT, LONG, PLAIN], (0.45, 0.45, 0.1), data, passes=None)
    packs = [pack for _ in range(100) for pack in plan.next_step().packs]
    tokens = sum(planned.tokens for pack in packs for planned in pack)
    assert tokens >= 0.99 * len(packs) * data.sequence_length


@pytest.mark.parametrize("per_shard", [1, len(PLAIN)])
def test_each_epoch_and_seed_has_its_own_order(per_shard: int) -> None:
    """Of the shards (one sample each) and of the samples in a shard (one shard)."""

    def order(seed: int, epoch: int) -> list[str]:
        made = SourceOrder("s", 0, source("s", PLAIN, per_shard), SIZER, seed, replace(DATA, open_shards=1), read)
        return [made.entry(made.document(epoch * len(PLAIN) + place)).key for place in range(len(PLAIN))]

    assert sorted(order(0, 0)) == sorted(order(0, 1)) == sorted(order(1, 0)) == sorted(f"s-{n}" for n in range(50))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6
    assert order(0, 1) == order(0, 1)


def test_a_permutation_sorts_raw_words_of_its_site() -> None:
    """numpy keeps raw words the same for ever, its shuffles it does not: a resume must see the same order."""
    words = np.random.Philox(key=derive(1, "x", 2)).random_raw(1000).tolist()
    assert permutation(1000, 1, "x", 2).tolist() == sorted(range(1000), key=words.__getitem__)
    assert permutation(1000, 1, "x", 2).tolist() != permutation(1000, 1, "y", 2).tolist()


def test_only_open_shards_are_mixed() -> None:
    plan = planner([PLAIN], (1.0,))
    shards = [planned.index for pack in all_packs(plan) for planned in pack]
    far = [abs(shards.index(shard) - max(n for n, s in enumerate(shards) if s == shard)) for shard in set(shards)]
    # A block is 2 shards of 3 samples; the window may hold samples of the blocks before.
    assert max(far) <= 2 * 3 + DATA.window


def test_the_cursor_stays_small_with_many_lanes_and_long_runs() -> None:
    data = replace(DATA, global_batch=1024, lanes=1024, window=800, max_wait=4096, sequence_length=200)
    plan = planner([PLAIN, SHORT, LONG], (1.0, 0.5, 0.2), data, passes=None)
    plan.next_step()
    assert len(json.dumps(plan.cursor())) < CURSOR_BYTES
    assert len(json.dumps(plan.cursor(), indent=2)) < CURSOR_BYTES


def test_a_capped_source_ends_and_leaves_its_place_to_the_others() -> None:
    documents = [SHORT, PLAIN]
    shards = {f"s{n}": source(f"s{n}", rows) for n, rows in enumerate(documents)}
    weights = {"s0": 0.5, "s1": 0.5}
    plan = Planner(shards, DATA, 0, SIZER, weights, None, {"s0": 2 * len(SHORT) + 5}, read=read)
    seen: Counter = Counter()
    for _ in range(200):
        seen.update(entry_of(planned).key for pack in plan.next_step().packs for planned in pack)
    assert not plan.finished
    assert Counter(seen[f"s0-{n}"] for n in range(len(SHORT))) == Counter({2: len(SHORT) - 5, 3: 5})
    assert min(seen[f"s1-{n}"] for n in range(len(PLAIN))) > 5
    both = Planner(shards, DATA, 0, SIZER, weights, None, {"s0": 7, "s1": 9}, read=read)
    packs = all_packs(both)
    assert sum(len(pack) for pack in packs) == 16 and both.next_step().packs == [[], []]


def test_the_last_source_to_end_counts_for_epochs() -> None:
    shards = {"few": source("few", PLAIN[:5]), "many": source("many", PLAIN)}
    assert Planner(shards, DATA, 0, SIZER, {"few": 1.0, "many": 1.0}, read=read).longest_lasting() == "many"
    assert Planner(shards, DATA, 0, SIZER, {"few": 0.01, "many": 1.0}, read=read).longest_lasting() == "few"


def test_sub_images_count_in_both_budgets() -> None:
    sizer = Sizer(Canvas(8, 8, sub_images=4), IMAGE_TOKENS)
    small = IMAGE._replace(width=8, height=8)
    (shard,) = source("s", [[IMAGE, text(3)], None, [small, IMAGE], [small]], per_shard=9)
    tokens, panels = sizer.rooms(read(shard.index).columns)
    assert panels.tolist() == [5, 0, 6, 1]
    assert tokens.tolist() == [5 * IMAGE_TOKENS + 3, 0, 6 * IMAGE_TOKENS, IMAGE_TOKENS]


@pytest.mark.parametrize(
    ("change", "sizer", "words"),
    [
        ({"max_images": 4}, Sizer(Canvas(8, 8, sub_images=4), 4), ["5 panels of 4 tokens", "max_images to at least 5"]),
        ({"sequence_length": 3}, SIZER, ["3 tokens", "sequence_length to at least 4"]),
        ({"max_wait": 9}, SIZER, ["data.max_wait is 9", "at least 10", "data.max_wait=10"]),
        ({"window": 5000}, SIZER, ["data.window is 5000", "1 ... 3", "64 KiB"]),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(change, sizer, words) -> None:
    with pytest.raises(ConfigError) as caught:
        Planner({"s": source("s", PLAIN)}, replace(DATA, **change), 0, sizer, {"s": 1.0}, read=read)
    for word in words:
        assert word in str(caught.value)


def test_no_source_with_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no source has a weight above 0"):
        Planner({}, DATA, 0, SIZER, {"s": 0.0}, read=read)


def test_a_cursor_of_another_plan_is_refused() -> None:
    cursor = planner([PLAIN], (1.0,)).cursor()
    with pytest.raises(DataError) as caught:
        planner([PLAIN[:-1]], (1.0,), replace(DATA, sequence_length=64)).restore(cursor)
    for words in ("sequence_length was 40, is 64", "source s0 was", "init_from"):
        assert words in str(caught.value)


def test_a_cursor_of_an_older_format_is_refused() -> None:
    cursor = planner([PLAIN], (1.0,)).cursor() | {"version": 1}
    with pytest.raises(DataError, match=r"another plan \(format was 1, is 2\)"):
        planner([PLAIN], (1.0,)).restore(cursor)
