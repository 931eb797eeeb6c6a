"""DeepSpeed's configuration: what is off because it is ours, and what is refused."""

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Parallel
from mmtrain.parallel.mesh import Mesh
from mmtrain.parallel.zero_config import check, zero_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_divisor_and_clipping_are_not_deepspeeds(stage: int) -> None:
    config = zero_config(Parallel(zero_stage=stage, tensor=2), Mesh(4, 2))
    assert config["gradient_accumulation_steps"] == 1 and config["gradient_clipping"] == 0.0
    assert config["train_batch_size"] == 2 and "scheduler" not in config and "optimizer" not in config
    assert config["zero_optimization"]["stage"] == stage


def test_bf16_accumulates_and_communicates_in_fp32() -> None:
    for stage in (1, 2, 3):
        config = zero_config(Parallel(zero_stage=stage, precision="bf16"), Mesh(1))
        assert config["data_types"]["grad_accum_dtype"] == "fp32" and config["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (Parallel(zero_stage=0, expert=2), "zero_stage = 0 with parallel.expert = 2.*use zero_stage 1 or 2"),
        (Parallel(zero_stage=3, expert=2), "zero_stage = 3 with parallel.expert = 2.*use zero_stage 2, or expert 1"),
        (Parallel(zero_stage=0, precision="bf16"), "zero_stage = 0 with parallel.precision = bf16.*use zero_stage 1"),
        (Parallel(zero_stage=0, offload_optimizer=True), "offload needs zero_stage 1, 2 or 3"),
    ],
)
def test_pairs_that_give_wrong_numbers_are_refused(parallel: Parallel, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(parallel)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        check(Parallel(zero_stage=0, expert=2, precision="bf16"))
    assert len(str(error.value).splitlines()) == 2
