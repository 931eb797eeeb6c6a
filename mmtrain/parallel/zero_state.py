"""The only file that reads DeepSpeed's private fields: where its optimizers keep masters, gradients and parameters.

One class a ZeRO family, the same five methods. DeepSpeed is pinned; tests/parallel holds each field to its meaning.
A `Shard` says which elements of a parameter this rank updates, and where in the optimizer's flat tensor they lie, so
moments are read from the torch optimizer; DeepSpeed's own links to them miss all groups but the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Shard:
    """A contiguous run of one parameter's elements that this rank's optimizer updates.

    name         global name.
    start, stop  elements of this rank's (cut) tensor, row-major.
    holder       fp32 tensor that the torch optimizer knows: key of its state.
    offset       where the run begins in the holder.
    """

    name: str
    start: int
    stop: int
    holder: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The parameter's elements [start, stop), all in this run, in a `tensor` laid out as the holder: a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset + start - self.start, stop - start)


class ZeroState(Protocol):
    """What the engine needs from a DeepSpeed optimizer."""

    def shards(self) -> list[Shard]:
        """This rank's runs of all trainable parameters."""
        ...

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """After the last backward of a step: this rank's summed gradients, live, by parameter."""
        ...

    def discard(self) -> None:
        """Forget all accumulated gradients."""
        ...

    def refresh(self) -> None:
        """Make the model's parameters equal to the masters."""
        ...


def zero_state(stage: int, engine: Any, names: dict[int, str], offload: bool) -> ZeroState:
    """The class for an initialised DeepSpeed engine. names: id of a parameter -> its global name."""
    if stage == 0:
        return WholeState(engine, names)
    if stage == 3:
        return PartitionedState(engine.optimizer, names, offload)
    return FlatState(engine.optimizer, names, offload)


class WholeState:
    """ZeRO-0 in fp32: parameters are their own masters, gradients are whole on every data rank."""

    def __init__(self, engine: Any, names: dict[int, str]) -> None:
        self._parameters = [
            (names[id(parameter)], parameter)
            for group in engine.optimizer.param_groups
            for parameter in group["params"]
        ]

    def shards(self) -> list[Shard]:
        """See ZeroState."""
        return [Shard(name, 0, parameter.numel(), parameter, 0) for name, parameter in self._parameters]

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ZeroState."""
        for name, parameter in self._parameters:
            if parameter.grad is not None:
                yield name, parameter.grad

    def discard(self) -> None:
        """See ZeroState."""
        for _, parameter in self._parameters:
            parameter.grad = None

    def refresh(self) -> None:
        """Nothing to do: parameters are the masters."""


class FlatState:
    """ZeRO-1 and 2 (DeepSpeedZeroOptimizer): each group is one flat tensor, cut into one run for each rank."""

    def __init__(self, optimizer: Any, names: dict[int, str], offload: bool) -> None:
        self._optimizer = optimizer
        self._names = names
        self._offload = offload

    def shards(self) -> list[Shard]:
        """See ZeroState."""
        opt = self._optimizer
        found = []
        for i, parameters in enumerate(opt.round_robin_bit16_groups):
            size = int(opt.partition_size[i])
            first = dist.get_rank(opt.real_dp_process_group[i]) * size
            holder = opt.single_partition_of_fp32_groups[i]
            for parameter, begin in zip(parameters, opt.round_robin_bit16_offsets[i], strict=True):
                low, high = max(begin, first), min(begin + parameter.numel(), first + size)
                if low < high:
                    found.append(Shard(self._names[id(parameter)], low - begin, high - begin, holder, low - first))
        return found

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ZeroState."""
        opt = self._optimizer
        if self._offload:
            opt._wait_for_offload_copies()  # on CUDA the last backward's are under way; only its own step() waits
            for shard in self.shards():
                yield shard.name, shard.of(shard.holder.grad, shard.start, shard.stop)
            return
        for i, parameters in enumerate(opt.params_in_partition):
            gradients = (g for g in opt.averaged_gradients[i] if not getattr(g, "_zero_padding", False))
            for parameter, gradient in zip(parameters, gradients, strict=False):  # a tail of padding may follow
                yield self._names[id(parameter)], gradient

    def discard(self) -> None:
        """What DeepSpeed does after an overflow, without its skipped-step account."""
        opt = self._optimizer
        opt.zero_grad(set_to_none=True)
        opt.micro_step_id = -1
        if self._offload:
            opt.reset_cpu_buffers()
            opt._offload_accumulated_param_ids = set()
            return
        for i in range(len(opt.bit16_groups)):
            opt.averaged_gradients[i] = None
            opt.all_grad_tensors[i] = None

    def refresh(self) -> None:
        """See ZeroState."""
        self._optimizer.update_lp_params()


class PartitionedState:
    """ZeRO-3 (DeepSpeedZeroOptimizer_Stage3): each parameter is cut into one run for each rank, padded at the end."""

    def __init__(self, optimizer: Any, names: dict[int, str], offload: bool) -> None:
        self._optimizer = optimizer
        self._names = names
        self._offload = offload

    def shards(self) -> list[Shard]:
        """See ZeroState."""
        opt = self._optimizer
        found = []
        for i, parameters in enumerate(opt.fp16_groups):
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start = dist.get_rank(opt._get_param_partition_group(parameter)) * size
                stop = min(start + size, parameter.ds_numel)
                if start < stop:
                    holder = opt.fp32_partitioned_groups_flat[i]
                    found.append(Shard(self._names[id(parameter)], start, stop, holder, offset))
                offset += size
        return found

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See ZeroState."""
        opt = self._optimizer
        if self._offload:
            for shard in self.shards():
                yield shard.name, shard.of(shard.holder.grad, shard.start, shard.stop)
            return
        for i, parameters in enumerate(opt.fp16_groups):
            for parameter, gradient in zip(parameters, opt.averaged_gradients[i], strict=True):
                yield self._names[id(parameter)], gradient

    def discard(self) -> None:
        """What DeepSpeed does after an overflow, without its skipped-step account."""
        opt = self._optimizer
        opt._pre_step()
        opt._partition_all_parameters()
        opt._overflow_clean_up(prev_scale=1.0)

    def refresh(self) -> None:
        """See ZeroState."""
        opt = self._optimizer
        opt._partition_all_parameters()
        for i, master in enumerate(opt.fp32_partitioned_groups_flat):
            opt.fp16_partitioned_groups_flat[i].data.copy_(master.data)
            opt._unflatten_partitioned_parameters(i)
        if opt.persistent_parameters:
            opt.persistent_parameters[0].all_gather(opt.persistent_parameters)


def write_whole(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Put `values` (this rank's whole cut tensor, flat) into a frozen parameter, partitioned by ZeRO-3 or not."""
    with torch.no_grad():
        if not hasattr(parameter, "ds_tensor"):
            parameter.view(-1).copy_(values)
            return
        size = parameter.partition_numel()
        start = dist.get_rank(parameter.ds_process_group) * size
        own = values[start : start + size]
        parameter.ds_tensor.view(-1)[: own.numel()].copy_(own)
        if parameter.numel() == values.numel():  # small parameters stay gathered beside their partition
            parameter.view(-1).copy_(values)
