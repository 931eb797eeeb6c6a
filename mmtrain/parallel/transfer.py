"""What a rank writes to a checkpoint, and how it takes it back, whatever layout wrote it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from mmtrain.parallel.box import Box, Kind, Piece
from mmtrain.parallel.groups import Groups
from mmtrain.parallel.tensor import Layout
from mmtrain.parallel.zero_state import Shard, ZeroState, write_whole

Read = Callable[[str, Kind, Box, tuple[int, int]], torch.Tensor]
"""(name, kind, box of the global tensor, range of the box's elements) -> those elements, fp32, 1-D."""

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Frozen:
    """This rank's share of a parameter that does not learn, kept in fp32 so that no precision touches it.

    start   first element of the share in this rank's (cut) tensor.
    values  fp32, 1-D, in host memory.
    """

    parameter: nn.Parameter
    start: int
    values: torch.Tensor

    @staticmethod
    def of(name: str, parameter: nn.Parameter, groups: Groups) -> "Frozen":
        """The share of a parameter that was just filled, whole as far as data ranks go."""
        start, stop = share(groups, name, parameter.numel())
        return Frozen(parameter, start, parameter.detach().view(-1)[start:stop].to("cpu", copy=True))


def share(groups: Groups, name: str, numel: int) -> tuple[int, int]:
    """This rank's range of `numel` elements that all its data ranks (for experts: replicas) hold."""
    index, count = groups.data_rank, groups.data_size
    if ".experts." in name:
        index, count = groups.mesh.replica(groups.rank), groups.mesh.replicas
    return numel * index // count, numel * (index + 1) // count


class Transfer:
    """Masters, moments and frozen parameters of one rank, as pieces of global tensors.

    optimizer  the torch optimizer that holds the moments.
    whole      whether data ranks hold the same masters (ZeRO-0).
    cut        names of which tensor ranks hold different elements.
    """

    def __init__(
        self,
        groups: Groups,
        layout: Layout,
        state: ZeroState,
        optimizer: torch.optim.Optimizer,
        frozen: dict[str, Frozen],
        whole: bool,
        cut: set[str],
    ) -> None:
        self._groups, self._layout, self._state = groups, layout, state
        self._optimizer, self._frozen = optimizer, frozen
        self._whole, self._cut = whole, cut

    def pieces(self, updates: int) -> Iterator[Piece]:
        """What this rank writes: over all ranks, each element of each tensor once. Views of live memory."""
        for shard in self._state.shards():
            first, end = share(self._groups, shard.name, shard.stop) if self._whole else (shard.start, shard.stop)
            start, stop = self._written(shard.name, first, end)
            if start < stop:
                placement = self._layout[shard.name]
                for kind, tensor in self._tensors(shard.holder):
                    step = updates if kind in MOMENTS else 0
                    values = shard.of(tensor, start, stop)
                    yield Piece(shard.name, kind, placement.shape, placement.real, (start, stop), values, step)
        for name, frozen in self._frozen.items():
            start, stop = self._written(name, frozen.start, frozen.start + frozen.values.numel())
            if start < stop:
                placement = self._layout[name]
                values = frozen.values[: stop - start]
                yield Piece(name, "param", placement.shape, placement.real, (start, stop), values)

    def _written(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """What of a parameter's elements [start, stop) this rank writes: not the vocabulary's padding, and nothing
        where another tensor rank holds the same elements."""
        speaks = self._groups.tensor_rank == 0 or name in self._cut
        return start, min(stop, self._layout[name].real.numel) if speaks else start

    def _tensors(self, holder: torch.Tensor) -> Iterator[tuple[Kind, torch.Tensor]]:
        """Master and moments of one holder."""
        yield "param", holder
        state = self._optimizer.state.get(holder, {})
        yield from ((kind, state[kind]) for kind in MOMENTS if kind in state)

    def load(self, read: Read, updates: int) -> None:
        """Take every parameter, and with `updates` > 0 AdamW's moments and step count, from `read`."""
        moments = updates > 0 and isinstance(self._optimizer, torch.optim.AdamW)
        with torch.no_grad():
            for shard in self._state.shards():
                self._restore(read, shard, "param", shard.holder)
                if moments:
                    state = _adam_state(self._optimizer, shard.holder, updates)
                    for kind in MOMENTS:
                        self._restore(read, shard, kind, state[kind])
            self._state.refresh()
            for name, frozen in self._frozen.items():
                self._restore_frozen(read, name, frozen)

    def _restore(self, read: Read, shard: Shard, kind: Kind, tensor: torch.Tensor) -> None:
        real = self._layout[shard.name].real
        stop = min(shard.stop, real.numel)
        if shard.start < stop:
            values = read(shard.name, kind, real, (shard.start, stop))
            shard.of(tensor, shard.start, stop).copy_(values)

    def _restore_frozen(self, read: Read, name: str, frozen: Frozen) -> None:
        placement = self._layout[name]
        whole = torch.zeros(placement.box.numel)
        whole[: placement.real.numel] = read(name, "param", placement.real, (0, placement.real.numel))
        frozen.values.copy_(whole[frozen.start : frozen.start + frozen.values.numel()])
        write_whole(frozen.parameter, whole)


def _adam_state(optimizer: torch.optim.Optimizer, holder: torch.Tensor, updates: int) -> dict[str, torch.Tensor]:
    """AdamW's state of `holder` after `updates` updates, made where the optimizer has not stepped yet."""
    state = optimizer.state[holder]
    if not state:
        # A fused step counts on the device.
        state["step"] = torch.zeros((), device=holder.device if optimizer.defaults["fused"] else "cpu")
        state.update({kind: torch.zeros_like(holder) for kind in MOMENTS})
    state["step"].fill_(float(updates))
    return state
