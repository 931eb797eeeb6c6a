"""The tiny recipe under a recipe's layout, on the ranks of a job that a launcher started."""

import math
from dataclasses import replace

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Parallel, Recipe
from mmtrain.parallel.groups import connect
from tests import tiny
from tests.parallel import compare, harness
from tests.parallel.harness import Record

STEPS = 5
ACCUMULATION = 2


def compare_layout(parallel: Parallel) -> int:
    """Train on every rank, compare on rank 0. The exit code, the same on all ranks: 1 where the numbers differ.

    ConfigError: a tensor size that the tiny recipe's heads do not hold.
    """
    heads = tiny.recipe().model.decoder.num_kv_heads
    if heads % parallel.tensor:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor}: the tiny recipe that is compared has {heads} key/value heads; add "
            f"parallel.tensor={heads} to the command, and start a job of a size that fits"
        )
    groups = connect(parallel)
    recipe = recipe_for(parallel, groups.data_size)
    record = harness.train(recipe, groups, STEPS, ACCUMULATION)
    states = [groups.all_gather_object(state) for state in record.state]
    largest = 0.0
    if groups.rank == 0:
        record.state = [harness.assemble(pieces) for pieces in states]
        largest = report(recipe, record, str(groups.mesh))
    largest = max(groups.all_gather_object(largest))
    groups.close()
    return int(not largest <= compare.TOLERANCE)


def recipe_for(parallel: Parallel, data_size: int) -> Recipe:
    """The tiny recipe with experts and packs that the layout divides, in fp32: bf16 has no numbers to be equal to."""
    experts = math.lcm(4, parallel.expert)
    recipe = tiny.recipe("adamw", replace(parallel, precision="fp32"), experts)
    batch = data_size * ACCUMULATION * 2
    return tiny.uneven(replace(recipe, data=replace(recipe.data, global_batch=batch)))


def report(recipe: Recipe, record: Record, mesh: str) -> float:
    """Print a row for each step; the largest difference, infinite where a token went to another expert."""
    rows = compare.compare(record, compare.reference_run(recipe, STEPS))
    print(f"{mesh}, ZeRO-{recipe.parallel.zero_stage}, fp32: differences from plain PyTorch in one process")
    print("\n".join(map(str, rows)))
    ties = sum(row.ties for row in rows)
    largest = max(row.largest() for row in rows)
    verdict = "equal" if largest <= compare.TOLERANCE and not ties else "DIFFERENT"
    print(f"{verdict}: largest {largest:.1e}, {ties} other choices of experts")
    return math.inf if ties else largest
