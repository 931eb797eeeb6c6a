"""DeepSpeed's configuration: what is off because it is ours, and that refused pairs are."""

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Parallel
from mmtrain.parallel.mesh import Mesh
from mmtrain.parallel.zero_config import zero_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_divisor_and_clipping_are_not_deepspeeds(stage: int) -> None:
    config = zero_config(Parallel(zero_stage=stage, tensor=2), Mesh(4, 2))
    assert config["gradient_accumulation_steps"] == 1 and config["gradient_clipping"] == 0.0
    assert config["train_batch_size"] == 2 and "scheduler" not in config and "optimizer" not in config
    assert config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("stage", [1, 2])
def test_one_data_rank_has_nothing_to_shard(stage: int) -> None:
    """Two tensor ranks; ZeRO-3 stays, whose parameters are partitioned when they are filled."""
    alone = Mesh(2, 2)
    assert zero_config(Parallel(zero_stage=stage, tensor=2), alone)["zero_optimization"]["stage"] == 0
    assert zero_config(Parallel(zero_stage=3, tensor=2), alone)["zero_optimization"]["stage"] == 3
    for option in ({"offload_optimizer": True}, {"precision": "bf16"}):
        config = zero_config(Parallel(zero_stage=stage, tensor=2, **option), alone)
        assert config["zero_optimization"]["stage"] >= stage


def test_bf16_accumulates_and_communicates_in_fp32() -> None:
    for stage in (1, 2, 3):
        config = zero_config(Parallel(zero_stage=stage, precision="bf16"), Mesh(1))
        assert config["data_types"]["grad_accum_dtype"] == "fp32" and config["communication_data_type"] == "fp32"


def test_pairs_that_give_wrong_numbers_are_refused_together() -> None:
    """tests/config/test_check.py has each of them."""
    with pytest.raises(ConfigError) as error:
        zero_config(Parallel(zero_stage=0, expert=2, precision="bf16"), Mesh(2, expert=2))
    first, second = str(error.value).splitlines()
    assert "parallel.zero_stage=0 with parallel.expert=2" in first
    assert "parallel.zero_stage=0 with precision=bf16" in second
