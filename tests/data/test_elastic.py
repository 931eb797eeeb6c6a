"""The promise of the stream: one sequence of global batches, whatever the ranks, lanes, micro-batches and restarts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.config.load import load
from mmtrain.config.schema import CURSOR_BYTES, Data
from mmtrain.data.image import Canvas
from mmtrain.data.ordering import Sizer
from mmtrain.data.plan import Planner
from tests.data.plans import IMAGE, SIZER, names, read, source, text
from tests.data.streams import make, packs, steps

ROOT = Path(__file__).parents[2]
STEPS = 5
LAYOUTS = st.sampled_from([(lanes, size) for lanes in (1, 2, 4, 8) for size in (1, 2, 4, 8) if lanes % size == 0])


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(LAYOUTS, st.integers(1, 2), st.sampled_from([1, 2, 4])), max_size=4), st.floats(0.1, 0.9))
def test_restarts_with_other_ranks_lanes_and_micro_batches(folder: Path, parts: list, weight: float) -> None:
    """Each part of the run has its own layout and goes on from the cursor of the part before."""
    first = make(folder)
    sources = {
        name: replace(s, weight=weight if name == "captions" else s.weight) for name, s in first.data.sources.items()
    }
    expected = [(packs(step), step.cursor) for step in steps(make(folder, sources=sources))]
    cursor, done = None, 0
    for (lanes, size), count, micro in [*parts, ((8, 1), STEPS, 1)]:
        if done == STEPS:
            break
        until = min(done + count, STEPS)
        micro = min(micro, 8 // size)
        made = make(folder, {"steps": until}, sources=sources, lanes=lanes, micro_batch=micro)
        ranks = [steps(made, rank, size, cursor=cursor) for rank in range(size)]
        assert {len(rank) for rank in ranks} == {until - done}
        for at, (whole, state) in enumerate(expected[done:until]):
            dealt = [iter(packs(rank[at])) for rank in ranks]
            assert [next(dealt[number % lanes % size]) for number in range(8)] == whole
            assert all(rank[at].cursor == state for rank in ranks)
        cursor, done = json.loads(json.dumps(expected[until - 1][1])), until
    assert done == STEPS


RECIPES = (
    "mm1_30b",
    "cumo_7b/3_instruct",
    *(f"{chain}/{name}" for chain in ("demo", "real", "smollm2") for name in ("2_prefinetune", "3_instruct")),
)
"""Those with more than one source; MM1's others have the same data."""


@pytest.mark.parametrize("name", RECIPES)
def test_the_mixture_of_our_recipes_holds_in_every_thousand_packs(name: str) -> None:
    recipe = load(ROOT / "configs" / "recipes" / f"{name}.yaml")
    data, per_image = recipe.data, recipe.model.connector.num_tokens
    sizer = Sizer(Canvas(*recipe.model.vision.image_size, sub_images=data.sub_images), per_image)
    rng = np.random.default_rng(0)
    shards, weights = {}, {}
    for source_name, of_source in data.sources.items():
        if of_source.weight:
            shards[source_name] = source(source_name, documents(source_name, rng), 200)
            weights[source_name] = of_source.weight
    plan = Planner(shards, replace(data, global_batch=1, lanes=1, micro_batch=1), 0, sizer, weights, read=read)
    served = np.array([list(plan.served.values())] + [_after_one(plan) for _ in range(1600)])
    made = served[1000:] - served[:-1000]
    shares = made / made.sum(1, keepdims=True)
    wanted = np.array(list(weights.values())) / sum(weights.values())
    assert np.abs(shares - wanted).max() <= 0.005


def _after_one(plan: Planner) -> list[int]:
    plan.next_step()
    return list(plan.served.values())


def documents(kind: str, rng: np.random.Generator) -> list:
    """Sizes like those of real captions, illustrated documents, texts and conversations."""
    means = {"captions": 2.8, "interleaved": 3.5, "text": 6.0}
    lengths = (rng.lognormal(means.get(kind, 4.5), 0.9, 2000) + 2).astype(int)
    if kind in ("text", "lima", "allava_text"):
        return [[text(int(n))] for n in lengths[:400]]
    if kind == "interleaved":
        return [[text(int(n)), IMAGE] * int(rng.integers(1, 9)) for n in lengths[:600]]
    return [[IMAGE, text(int(n))] for n in lengths]  # captions, and conversations about an image


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 200), st.integers(0, 5))
def test_the_cursor_is_small_with_4096_lanes(sources: int, longest: int, seed: int) -> None:
    data = Data(tokenizer="", sequence_length=200, max_images=4, global_batch=4096, lanes=4096, max_wait=4096)
    data = replace(data, window=data.most_window(sources))
    rows = {f"s{n}": [[text(1 + (longest * k + seed) % 190)] for k in range(50)] for n in range(sources)}
    shards = {name: source(name, made) for name, made in rows.items()}
    plan = Planner(shards, replace(data, global_batch=64), seed, SIZER, dict.fromkeys(shards, 1.0), read=read)
    plan.next_step()
    cursor = plan.cursor()
    for state in cursor["sources"].values():  # as late in a long run
        state["next"][0] += 10**10
        state["served"] += 10**15
        state["waiting"] = f"{10**10}" + state["waiting"]
    assert len(json.dumps(cursor, indent=2)) < CURSOR_BYTES
    assert len(names(plan.next_step().packs)) == 64
