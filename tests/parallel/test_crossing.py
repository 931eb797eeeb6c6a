"""Checkpoints know nothing of the layout that wrote them. `python -m tools.parity --checkpoints` runs all pairs."""

import pytest

from tests.parallel import crossing
from tests.parallel.compare import TOLERANCE
from tests.parallel.crossing import Pair

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[Pair, tuple[float, str]]:
    found = crossing.run(crossing.ring(), tmp_path_factory.mktemp("crossing"))
    return {pair: (largest, row) for pair, largest, row in found}


@pytest.mark.parametrize("pair", crossing.ring(), ids=str)
def test_training_goes_on_under_another_layout(pair: Pair, rows: dict[Pair, tuple[float, str]]) -> None:
    largest, row = rows[pair]
    assert largest <= TOLERANCE, row


def test_every_layout_saves_and_loads() -> None:
    ring = crossing.ring()
    assert {pair.saved for pair in ring} == {pair.loaded for pair in ring} == set(crossing.LAYOUTS)
    assert len(crossing.all_pairs()) == 90
