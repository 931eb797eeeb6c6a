"""Process groups and the few collectives that the rest of the program needs.

megatron.core.parallel_state makes the groups; `Mpu` shows them to DeepSpeed. One process goes the same way as many.
"""

import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmtrain.config.schema import Parallel
from mmtrain.parallel.environment import Place, device_number, discover, port_in_use
from mmtrain.parallel.libraries import deepspeed, parallel_state
from mmtrain.parallel.mesh import Mesh

TIMEOUT = timedelta(minutes=30)


class Mpu:
    """What DeepSpeed asks of a model-parallel unit. parallel_state lacks half of these names.

    It must not have an attribute `initialize_sequence_parallel`: its presence makes DeepSpeed ignore all groups.
    """

    def __init__(self, groups: "Groups") -> None:
        self._groups = groups

    def get_data_parallel_world_size(self) -> int:
        """Data-parallel size."""
        return self._groups.data_size

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self._groups.data_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share this rank's slice of the matrices."""
        return self._groups.data

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel size (there is no pipeline)."""
        return self._groups.mesh.tensor

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self._groups.tensor_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share each matrix."""
        return self._groups.tensor

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group


class Groups:
    """This process's place in the mesh, its device, and its process groups.

    tensor   ranks that share each matrix         data      ranks with the same slices and other packs
    expert   ranks that exchange tokens           replica   ranks that hold the same experts
    """

    def __init__(self, place: Place, mesh: Mesh, device: torch.device) -> None:
        self.mesh = mesh
        self.device = device
        self.rank, self.world = place.rank, mesh.world
        self.data_rank, self.data_size = mesh.data_rank(place.rank), mesh.data
        self.tensor_rank = mesh.tensor_rank(place.rank)
        self.tensor = parallel_state.get_tensor_model_parallel_group()
        self.data = parallel_state.get_data_parallel_group()
        self.expert = parallel_state.get_expert_model_parallel_group()
        self.replica = parallel_state.get_expert_data_parallel_group()
        self.mpu = Mpu(self)

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over the data-parallel ranks, in place; returns it."""
        dist.all_reduce(tensor, group=self.data)
        return tensor

    def sum_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all ranks, in place; returns it."""
        dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Return when every rank is here."""
        # NCCL's collectives return at once: it is reading the sum that waits.
        self.sum_over_world(torch.zeros((), device=self.device)).item()

    def all_gather_object(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Anything that pickle takes."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """End the process groups. Call it on every rank, last of all."""
        parallel_state.destroy_model_parallel()
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None


def connect(parallel: Parallel, place: Place | None = None, timeout: timedelta = TIMEOUT) -> Groups:
    """Join the job: process group, mesh groups, device. gloo on CPU, NCCL on CUDA.

    `timeout` bounds every collective. ConfigError: the world does not fit the layout, this machine has too few GPUs, or
    rank 0's port is in use.
    """
    place = discover() if place is None else place
    mesh = Mesh(place.world, parallel.tensor, parallel.expert)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place = replace(place, local_rank=device_number(place, torch.cuda.device_count()))  # DeepSpeed's device, too
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    _start(place, "nccl" if device.type == "cuda" else "gloo", timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor,
        expert_model_parallel_size=mesh.expert,
        expert_tensor_parallel_size=mesh.tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    return Groups(place, mesh, device)


def _start(place: Place, backend: str, timeout: timedelta) -> None:
    """torch.distributed and DeepSpeed's view of it."""
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    # DeepSpeed would compile an inference collective with g++ here (25 s the first time) that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise port_in_use(place) from error
        raise
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
