"""DeepSpeed's configuration for a recipe, a pure function.

| precision | stage | optimizer class that DeepSpeed picks | gradient sums |
|---|---|---|---|
| fp32 | 0; 1 and 2 on one data rank | the torch optimizer itself | fp32, whole on every rank |
| fp32, bf16 | 1 | DeepSpeedZeroOptimizer (bf16: with gradients sharded, as in stage 2) | fp32 |
| fp32, bf16 | 2 | DeepSpeedZeroOptimizer | fp32, sharded |
| fp32, bf16 | 3 | DeepSpeedZeroOptimizer_Stage3 | fp32, sharded |
"""

from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.config.layout import engine_problems
from mmtrain.config.schema import Parallel
from mmtrain.parallel.mesh import Mesh


def zero_config(parallel: Parallel, mesh: Mesh) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize. ConfigError: a pair of settings that DeepSpeed gets wrong.

    Accumulation, divisors, norms, clipping and the schedule are ours (mmtrain.parallel.engine), so each is off here
    and happens in exactly one place.
    """
    if problems := list(engine_problems(parallel)):
        raise ConfigError("\n".join(problems))
    bf16 = parallel.precision == "bf16"
    stage = built_stage(parallel, mesh)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "round_robin_gradients": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "memory_efficient_linear": False,
    }
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET // 10, "stage3_param_persistence_threshold": 100_000}
    elif stage and not parallel.offload_optimizer:
        zero["compute_grad_norm"] = False
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": mesh.data,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "wall_clock_breakdown": False,
    }
    if bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def built_stage(parallel: Parallel, mesh: Mesh) -> int:
    """The stage that DeepSpeed is built with for a recipe's `zero_stage`; the numbers are the same.

    On one data rank stages 1 and 2 have nothing to shard, but would still copy each gradient into buckets and back.
    """
    if parallel.precision == "bf16":
        return max(2, parallel.zero_stage)
    alone = mesh.data == 1 and parallel.zero_stage < 3 and not parallel.offload_optimizer
    return 0 if alone else parallel.zero_stage


BUCKET = 50_000_000
"""Elements that one gradient message holds at most."""
