"""Pairs of settings that only show together: a covering part of all layouts, each equal to plain PyTorch.

`python -m tools.parity --all` runs every one. Here every pair of values of stage, tensor, expert, accumulation,
optimizer, clipping and checkpointing that any layout has is run in some case, on up to 8 ranks.
"""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.parallel import compare, harness, matrix
from tests.parallel.matrix import Case, Line

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Line]:
    return {line.case: line for line in matrix.run(matrix.covering(), tmp_path_factory.mktemp("matrix"))}


@pytest.mark.parametrize("case", matrix.covering(), ids=str)
def test_layout_equals_plain_pytorch(case: Case, lines: dict[Case, Line]) -> None:
    line = lines[case]
    assert not line.error, line.error
    moments = {"exp_avg", "exp_avg_sq"} if case.optimizer == "adamw" else set()
    assert line.largest.keys() == {"loss", "term", "norm", "part_norm", "param"} | moments
    assert max(line.largest.values()) <= compare.TOLERANCE, (line.largest, line.where)
    assert line.ties == 0


def test_every_pair_of_values_is_covered() -> None:
    accepted = [case for case in matrix.full() if not case.refused()]
    wanted = set().union(*map(matrix.pairs, accepted))
    assert wanted <= set().union(*map(matrix.pairs, matrix.covering()))
    assert {case.world for case in matrix.covering()} == set(matrix.GLOBAL_BATCH)


def test_all_layouts_that_fit_are_in_the_matrix() -> None:
    layouts = {case[:4] for case in matrix.full()}
    assert len(layouts) == 80 and (8, 2, 4, 2) in layouts and (8, 3, 2, 4) in layouts and (6, 3, 1, 1) in layouts
    assert not any(tensor * expert > world for world, _, tensor, expert in layouts)


def test_refused_layouts_say_why() -> None:
    refused = {case[1:4]: case.refused() for case in matrix.full() if case.refused()}
    assert refused.keys() == {(0, tensor, expert) for tensor, expert in ((1, 2), (2, 2), (4, 2), (1, 4), (2, 4))}
    assert all("parallel.expert" in reason and "take zero_stage" in reason for reason in refused.values())


def test_the_matrix_is_a_hard_one() -> None:
    recipe = Case(4, 2, 2, 2, 4, "adamw", True, False).recipe()
    record = compare.reference_run(recipe, matrix.STEPS)
    assert min(record.margins) > 1e-6
    unused = [step["connector"][:, tiny.UNUSED] for step in record.counts]
    assert torch.stack(unused).eq(0).all(), "an expert that no token chooses"
    assert record.terms[3]["source 2"] > 0 == record.terms[4]["source 2"], "a source that ends"
    assert all(norm > recipe.optim.clip for norm in record.norms)
    coefficients = {getattr(recipe.model, part).moe.balance_coef for part in harness.sparse(recipe)}
    assert len(coefficients) == 3
    images = [sum(len(pack.images) for pack in tiny.packs(recipe.model, 1, count=32)[part:][:8]) for part in (0, 24)]
    assert images[0] > 0 == images[1], "ranks without an image"


def test_a_case_that_hangs_or_dies_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line says so, and the cases after it are run."""
    cases = [Case(1, 1, 1, 1, acc, "sgd", True, False) for acc in (1, 4)]
    monkeypatch.setattr(matrix, "run_cases", die_in_the_first)
    first, second = matrix.run(cases, tmp_path)
    assert "no such luck" in first.error and not first.passes()
    assert second.passes() and second.largest


def die_in_the_first(folder: str, cases: list[Case]) -> None:
    """On a rank."""
    if cases[0].accumulation == 1:
        raise RuntimeError("no such luck")
    matrix.run_cases(folder, cases)
