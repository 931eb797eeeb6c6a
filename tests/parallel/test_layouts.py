"""Every layout is one process: layouts against plain PyTorch by the rule of the design, and what else they owe.

The reference runs in float64, so the numbers are the engine's own rounding. AdamW's eps is 1e-4 here: at 1e-8 Adam
turns rounding into steps of size lr. Each layout's ranks start once for all checks; one layout of each ZeRO stage does
so in new interpreters, where nothing that an earlier layout left behind can help or harm.
"""

import pytest
import torch

from mmtrain.config.schema import PARTS, Parallel
from tests import dist, tiny
from tests.parallel import audit, checks, compare, harness
from tests.parallel.compare import TOLERANCE
from tests.parallel.harness import Record

pytestmark = pytest.mark.timeout(360)
STEPS = 6
LAYOUTS = {
    "one process, ZeRO-1": (1, Parallel(zero_stage=1)),
    "ZeRO-1 on 2 ranks": (2, Parallel(zero_stage=1)),
    "ZeRO-2 with experts over 2 ranks": (2, Parallel(zero_stage=2, expert=2)),
    "ZeRO-1 with 2 tensor ranks": (2, Parallel(zero_stage=1, tensor=2)),
    "ZeRO-2 with 2 tensor ranks that share positions": (2, Parallel(zero_stage=2, tensor=2, sequence_parallel=True)),
    "ZeRO-3 on 2 ranks": (2, Parallel(zero_stage=3)),
    "ZeRO-3 with experts over 2 ranks": (2, Parallel(zero_stage=3, expert=2)),
    "ZeRO-0 on one process": (1, Parallel(zero_stage=0)),
}
FRESH = ("ZeRO-0 on one process", "ZeRO-1 on 2 ranks", "ZeRO-2 with experts over 2 ranks", "ZeRO-3 on 2 ranks")


@pytest.fixture(scope="module")
def wanted() -> dict[str, Record]:
    return {name: compare.reference_run(tiny.recipe(name), STEPS) for name in ("adamw", "sgd")}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, wanted: dict[str, Record], tmp_path_factory: pytest.TempPathFactory):
    """(folder of records, results of the checks by rank) of one layout."""
    world, parallel = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("layout")
    torch.save(vars(wanted["adamw"]), folder / "wanted.pt")
    return folder, dist.run(
        checks.everything,
        world,
        str(folder),
        parallel,
        STEPS,
        str(folder / "wanted.pt"),
        limit=300,
        fresh=request.param in FRESH,
    )


def test_the_recipe_is_a_hard_one(wanted: dict[str, Record]) -> None:
    recipe = tiny.recipe()
    assert all(norm > recipe.optim.clip for norm in wanted["adamw"].norms)
    clipped = [{part for part in PARTS if norms[part] > recipe.optim.clip} for norms in wanted["sgd"].part_norms]
    assert all(clipped) and any(len(parts) < 3 for parts in clipped)
    images = [[len(pack.images) for pack in tiny.packs(recipe.model, step)] for step in range(STEPS)]
    assert any(sum(counts[4:]) == 0 < sum(counts[:4]) for counts in images)
    counts = torch.stack([step["decoder"][0] for step in wanted["adamw"].counts])
    assert counts.min(1).values.lt(counts.max(1).values / 2).any()
    assert min(min(record.margins) for record in wanted.values()) > 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_numbers_are_those_of_plain_pytorch(layout, wanted: dict[str, Record], optimizer: str) -> None:
    found = harness.load_record(layout[0], optimizer)
    rows = compare.compare(found, wanted[optimizer])
    kinds = {"param", "exp_avg", "exp_avg_sq"} if optimizer == "adamw" else {"param"}
    assert len(rows) == STEPS and all(row.worst.keys() == kinds for row in rows)
    assert max(row.largest() for row in rows) <= TOLERANCE, compare.table(optimizer, found, wanted[optimizer])


def test_any_state_loads_and_training_goes_on(layout, wanted: dict[str, Record]) -> None:
    found = harness.load_record(layout[0], "resumed")
    rows = compare.compare(found, compare.tail(wanted["adamw"], checks.HALF))
    assert len(rows) == 2 and max(row.largest() for row in rows) <= TOLERANCE


def test_one_step_from_every_state_with_the_default_eps(layout, wanted: dict[str, Record]) -> None:
    """Adam's own eps turns rounding into steps, so parameters are not compared: loss, norms and first moments are."""
    rows = compare.compare(harness.load_record(layout[0], "own_eps"), wanted["adamw"])
    assert len(rows) == STEPS
    for row in rows:
        assert max(row.loss, row.term[0], row.norm, row.part_norm[0], row.worst["exp_avg"][0]) <= TOLERANCE, str(row)


def test_upcycled_logits_are_those_of_the_dense_parent(layout) -> None:
    recipe = checks.dense_recipe(Parallel())
    wanted = compare.reference_logits(recipe, 0)
    for rank in layout[1]:
        for parts in checks.UPCYCLED:
            found = rank["upcycled"][parts]
            assert (found["logits"] - wanted).abs().max() <= 1e-5, parts
            assert tuple(found["counts"]) == parts
            for part, counts in found["counts"].items():
                assert (counts[:, tiny.UNUSED] == 0).all()
                assert (counts.max(1).values > 1.05 * counts[:, : tiny.UNUSED].min(1).values).all(), (part, counts)
        assert (rank["upcycled"]["sliced"]["logits"] - wanted).abs().max() <= 1e-5


def test_own_state_loads_to_the_bit(layout) -> None:
    assert all(rank["resume"] == [] for rank in layout[1])


def test_discard_and_a_nan_on_one_rank_change_nothing(layout) -> None:
    for rank in layout[1]:
        found = rank["discard"]
        assert found["dropped"] == found["poisoned"] == [] and found["untouched"] and not found["applied"]
        assert found["went on"] == []


def test_evaluation_is_the_forward_without_a_trace(layout, wanted: dict[str, Record]) -> None:
    for rank in layout[1]:
        found = rank["evaluate"]
        assert not found["graph"] and found["total"] == pytest.approx(wanted["adamw"].losses[0], rel=TOLERANCE)
        assert found["norm"] == pytest.approx(wanted["adamw"].norms[0], rel=TOLERANCE)
        assert compare.distance(found["logits"], reference_logits()) <= TOLERANCE


def reference_logits() -> torch.Tensor:
    """Logits at the positions that checks.evaluate asks for, by the reference."""
    recipe = tiny.recipe()
    return compare.reference_logits(recipe, 0)[torch.arange(0, 64, 5)]


def test_frozen_parameters_keep_their_bits_and_are_saved(layout) -> None:
    for rank in layout[1]:
        found = rank["frozen"]
        assert found["moved"] and all(name.startswith("connector.") for name in found["moved"])
        assert found["parts"] == ["connector"] and found["loaded"] == []
        loss, other, back = found["losses"]
        assert back == pytest.approx(loss, rel=1e-6) and abs(other - loss) > 0.1
        assert found["names"] == sorted(harness.parts_of(tiny.recipe())[1].entries)


def test_every_layout_starts_from_the_same_values_and_moves_each_entry_by_its_rate(layout) -> None:
    start, rows = layout[1][0]["audit"]
    registry = harness.parts_of(tiny.recipe())[1]
    assert all(
        start["param", name].equal(harness.start_values(registry, name)[: entry.role.rows])
        for name, entry in registry.entries.items()
    )
    assert [row.name for row in rows] == list(registry.entries) and all(row.entries for row in rows)
    assert [row for row in rows if abs(row.ratio - 1) > audit.TOLERANCE] == []


def test_key_biases_without_rope_have_rounding_for_a_gradient() -> None:
    """They are exempt from the rule above, by name; here is why."""
    grads = compare.reference_gradients(tiny.recipe(), 0)
    exempt = {name: grad for name, grad in grads.items() if compare.is_rounding(name)}
    assert len(exempt) == tiny.recipe().model.vision.built_layers()
    assert all(float(grad.norm()) < 1e-12 * float(grads["vision.positions"].norm()) for grad in exempt.values())


def test_a_plan_of_the_pieces_has_no_padding(layout) -> None:
    record = harness.load_record(layout[0], "adamw")
    assert record.state[0]["param", "decoder.head.weight"].shape[0] == tiny.recipe().model.decoder.vocab_size
