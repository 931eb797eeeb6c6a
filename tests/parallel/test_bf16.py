"""bf16 compute with fp32 masters and gradient sums stays near fp32.

Tolerance: bf16 keeps 8 bits, so one rounding is 4e-3; the loss of the tiny recipe is a mean over some hundred
logarithms and stays within 1 %, the gradient norm within 10 %.
"""

from pathlib import Path

import pytest

from mmtrain.config.schema import Parallel
from mmtrain.parallel.groups import connect
from tests import dist, tiny
from tests.parallel import checks, compare, harness

STEPS = 4


def run(folder: str, stage: int) -> tuple[list[str], dict[str, object]]:
    """On a rank: train in bf16; the dtypes of gradients at the end of a step, of masters and of parameters; and what
    a step that is dropped leaves behind."""
    parallel = Parallel(zero_stage=stage, precision="bf16")
    recipe, groups = tiny.recipe("adamw", parallel), connect(parallel)
    record = harness.train(recipe, groups, STEPS)
    engine = harness.build(recipe, groups)
    packs = tiny.packs(recipe.model, 0)
    harness.accumulate(engine, recipe, groups, packs, harness.inputs_of(recipe, packs), 2)
    dtypes = {str(gradient.dtype) for _, gradient in engine._state.gradients()}
    dtypes |= {str(piece.tensor.dtype) for piece in engine.pieces()}
    computed = {str(parameter.dtype) for parameter in engine._engine.module.parameters()}
    discarded = checks.discard(recipe, groups, record)
    harness.save_record(record, folder, "bf16", groups.rank)
    groups.close()
    return sorted(dtypes) + sorted(computed), discarded


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_tracks_fp32_and_drops_a_step_to_the_bit(stage: int, tmp_path: Path) -> None:
    for dtypes, discarded in dist.run(run, 2, str(tmp_path), stage):
        assert dtypes == ["torch.float32", "torch.bfloat16"]
        assert discarded["dropped"] == discarded["poisoned"] == discarded["went on"] == []
        assert discarded["untouched"] and not discarded["applied"]
    found = harness.load_record(tmp_path, "bf16")
    wanted = compare.reference_run(tiny.recipe(), STEPS)
    assert found.losses == pytest.approx(wanted.losses, rel=0.01)
    assert found.norms == pytest.approx(wanted.norms, rel=0.1)
