"""How DeepSpeed learns that experts are spread over ranks.

ZeRO-1 and 2: marked parameters, and one module of a type that it knows. ZeRO-3 refuses that type; there a parameter
says itself over which ranks it is partitioned (attributes that DeepSpeed's AutoEP layers set; private, pinned, tested).
"""

from typing import Any

from torch import nn

from mmtrain.parallel.groups import Groups
from mmtrain.parallel.libraries import MoE, deepspeed
from mmtrain.parallel.tensor import parameters


class ExpertMarker(MoE):
    """A module without weights. DeepSpeed handles experts only where it finds an instance of its own MoE class, and
    then asks that instance to register the expert groups."""

    def __init__(self, groups: Groups) -> None:
        nn.Module.__init__(self)
        self._groups = groups
        self.num_experts = self.num_local_experts = groups.mesh.expert
        self.expert_group_name = self.group_name(groups.mesh.expert)

    @staticmethod
    def group_name(expert: int) -> str:
        """DeepSpeed's key for expert groups of that size; the optimizer group's `name` must be the same."""
        return f"ep_size_{expert}"

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed."""
        register(self._groups)


def register(groups: Groups) -> None:
    """Give DeepSpeed megatron-core's expert groups; its own would lie differently."""
    mesh, name, registry = groups.mesh, ExpertMarker.group_name(groups.mesh.expert), deepspeed.utils.groups
    registry._EXPERT_PARALLEL_GROUP[name] = groups.expert
    registry._EXPERT_DATA_PARALLEL_GROUP[name] = groups.replica
    registry._EXPERT_PARALLEL_GROUP_RANKS[name] = mesh.expert_groups()
    registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = mesh.replica_groups()


def place_experts(model: nn.Module, groups: Groups) -> None:
    """ZeRO-3: partition experts, frozen ones too, over the ranks that hold the same ones. Before the partition."""
    if groups.mesh.expert == 1:
        return
    register(groups)
    for name, parameter in parameters(model):
        if ".experts." in name:
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = ExpertMarker.group_name(groups.mesh.expert)
            parameter.ds_zero_partition_process_group = groups.replica


def mark_experts(model: nn.Module, optimizer_groups: list[dict[str, Any]], groups: Groups) -> None:
    """ZeRO-1 and 2: mark the experts that learn, when they are spread. Frozen ones are nothing to DeepSpeed."""
    if groups.mesh.expert == 1:
        return
    experts = {name for group in optimizer_groups if group["expert"] for name in group["names"]}
    if not experts:
        return
    model.expert_marker = ExpertMarker(groups)
    for name, parameter in parameters(model):
        if name in experts:
            parameter.allreduce = False
            parameter.group_name = model.expert_marker.expert_group_name
