"""The promise of the stream: one sequence of global batches, whatever the ranks, lanes, micro-batches and restarts."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtrain.config.load import load
from mmtrain.config.schema import CURSOR_BYTES, Data, Source
from mmtrain.data.image import Canvas
from mmtrain.data.ordering import Sizer
from mmtrain.data.plan import Planner
from tests.data.inputs import write_tar
from tests.data.plans import IMAGE, SIZER, names, read, source, text
from tests.data.streams import caption, index, make, packs, plain, steps

ROOT = Path(__file__).parents[2]
STEPS = 5
LAYOUTS = st.sampled_from([(lanes, size) for lanes in (1, 2, 4, 8) for size in (1, 2, 4, 8) if lanes % size == 0])


@dataclass(frozen=True)
class Drawn:
    """A source of real shards."""

    images: bool
    samples: int
    per_shard: int
    weight: float


SOURCES = st.lists(
    st.builds(Drawn, st.booleans(), st.integers(1, 40), st.integers(1, 13), st.floats(0.1, 1.0)), min_size=1, max_size=3
)
PARTS = st.tuples(LAYOUTS, st.integers(1, 2), st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 1, 2]))
"""Lanes and ranks, steps, micro-batch, workers of a part of a run."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


def written(root: Path, drawn: list[Drawn]) -> dict[str, Source]:
    """The sources, their shards on disk; made once each."""
    found = {}
    for number, made in enumerate(drawn):
        place = root / f"{made.images}-{made.samples}-{made.per_shard}"
        if not place.exists():
            sample = caption if made.images else plain
            write_tar(place, [sample(row) for row in range(made.samples)], made.per_shard)
            index(place)
        found[f"source{number}"] = Source(str(place), made.weight)
    return found


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(SOURCES, st.lists(PARTS, max_size=4))
def test_restarts_with_other_ranks_lanes_micro_batches_and_workers(root: Path, drawn: list, parts: list) -> None:
    """Each part of the run has its own layout and goes on from the cursor of the part before."""
    sources = written(root, drawn)
    expected = [(packs(step), step.cursor) for step in steps(make(root, sources=sources))]
    cursor, done = None, 0
    for (lanes, size), count, micro, workers in [*parts, ((8, 1), STEPS, 1, 0)]:
        if done == STEPS:
            break
        until = min(done + count, STEPS)
        layout = {"lanes": lanes, "micro_batch": min(micro, 8 // size), "workers": workers if size == 1 else 0}
        made = make(root, {"steps": until}, sources=sources, **layout)
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
