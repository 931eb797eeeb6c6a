"""How DeepSpeed learns that experts are spread over ranks: marked parameters, and one module of a type it knows."""

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
        """Called by DeepSpeed: the groups are megatron-core's; DeepSpeed's own would lie differently."""
        mesh, name = self._groups.mesh, self.expert_group_name
        registry = deepspeed.utils.groups
        registry._EXPERT_PARALLEL_GROUP[name] = self._groups.expert
        registry._EXPERT_DATA_PARALLEL_GROUP[name] = self._groups.replica
        registry._EXPERT_PARALLEL_GROUP_RANKS[name] = mesh.expert_groups()
        registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = mesh.replica_groups()


def mark_experts(model: nn.Module, optimizer_groups: list[dict[str, Any]], groups: Groups) -> None:
    """Mark the experts that learn, when they are spread over ranks. Frozen ones are nothing to DeepSpeed."""
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
