"""Imports DeepSpeed and megatron-core once, quietly, for the accelerator at hand.

Both announce on import what is not installed (Apex, Transformer Engine, CUDA toolkits); nothing here uses any of it.
"""

import logging
import os
import warnings

import torch

os.environ.setdefault("DS_LOG_LEVEL", "error")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.moe.layer import MoE
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that newer PyTorch has renamed; it says so at every call.
warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)

__all__ = ["MoE", "ModelParallelConfig", "deepspeed", "parallel_state", "tensor_parallel"]
