"""A longer run in bf16 beside the same run in fp32; the batches come again, so that there is something to learn."""

from mmtrain.config.schema import Parallel
from mmtrain.parallel.groups import connect
from tests import tiny
from tests.parallel import harness

STEPS = 200
WINDOW = 10
TOLERANCE = 0.01


def losses(precision: str, steps: int = STEPS) -> list[float]:
    """On a rank: the loss of each step under ZeRO-1."""
    parallel = Parallel(zero_stage=1, precision=precision)
    recipe, groups = tiny.recipe("adamw", parallel), connect(parallel)
    engine, routers = harness.build(recipe, groups), harness.routers_of(recipe)
    found: list[float] = []
    for first in range(0, steps, WINDOW):  # a record holds the state after each of its steps
        found += harness.train(recipe, groups, first + WINDOW, 2, engine, first, routers).losses
    groups.close()
    return found


def window_means(values: list[float]) -> list[float]:
    """Means of WINDOW steps each."""
    return [sum(values[first : first + WINDOW]) / WINDOW for first in range(0, len(values), WINDOW)]
