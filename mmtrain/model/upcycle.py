"""Co-upcycling (arXiv:2212.05055, CuMo arXiv:2405.05949): which dense tensor each tensor of a sparse model starts from.

Pure maps from names to names and from a dense tensor to what an expert takes of it, used tensor by tensor, so that no
model ever stands whole in memory. Experts are copies of the dense MLP or, with granularity G > 1, its G slices;
mmtrain.config.experts says when these compute what the dense MLP computes.

Letters: f dense hidden width, G granularity.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mmtrain.config.experts import routed_slices
from mmtrain.config.schema import Moe
from mmtrain.config.seed import derive

_EXPERTS = re.compile(r"(?P<mlp>.+\.mlp)\.experts\.(?P<layer>up|gate|down)(?P<bias>_bias)?")
_SHARED = re.compile(r"(?P<mlp>.+\.mlp)\.shared\.(?P<layer>up|gate|down)\.(?P<kind>weight|bias)")
_HIDDEN = {"up.weight": 0, "up.bias": 0, "gate.weight": 0, "down.weight": 1}
"""Tensor of a dense MLP -> its dimension of length f; the bias behind `down` has none."""


@dataclass(frozen=True)
class Copy:
    """The tensor is the source's tensor `name`."""

    name: str


@dataclass(frozen=True)
class Experts:
    """Every expert of the tensor is the source's dense tensor `name`, or a slice of it."""

    name: str


@dataclass(frozen=True)
class Shared:
    """The tensor of a shared expert is the source's dense tensor `name`, or slices of it."""

    name: str


@dataclass(frozen=True)
class Fresh:
    """The source has nothing for the tensor: it starts by muP's rule."""


Origin = Copy | Experts | Shared | Fresh


def source_of(name: str, source_names: Collection[str]) -> Origin:
    """Where tensor `name` of the target comes from, given the names of the source's tensors.

    The same name wins; tensors of routed and shared experts come from the dense MLP in their place; a router has no
    dense counterpart.
    """
    if name in source_names:
        return Copy(name)
    if match := _EXPERTS.fullmatch(name):
        dense = f"{match['mlp']}.{match['layer']}.{'bias' if match['bias'] else 'weight'}"
        return Experts(dense) if dense in source_names else Fresh()
    if match := _SHARED.fullmatch(name):
        dense = f"{match['mlp']}.{match['layer']}.{match['kind']}"
        return Shared(dense) if dense in source_names else Fresh()
    return Fresh()


def dense_shape(origin: Experts | Shared, shape: tuple[int, ...], moe: Moe) -> tuple[int, ...]:
    """The shape that the dense tensor must have, given that of the target's tensor."""
    own = list(shape[1:] if isinstance(origin, Experts) else shape)
    dim = _hidden(origin.name)
    if dim is not None:
        slices = 1 if isinstance(origin, Experts) else moe.shared
        own[dim] = own[dim] // slices * moe.granularity
    return tuple(own)


def _hidden(dense: str) -> int | None:
    """The dimension of length f of a dense MLP's tensor."""
    return _HIDDEN.get(".".join(dense.split(".")[-2:]))


def routed_part(name: str, dense: torch.Tensor, expert: int, moe: Moe) -> torch.Tensor:
    """What expert number `expert` (global) takes of the dense MLP's tensor `name`: its slice.

    Experts c * r .. c * r + r - 1 are copy c of the r slices that routed experts hold. The bias behind `down` is
    divided by G: each of the G slices brings its share.
    """
    dim = _hidden(name)
    if dim is None:
        return dense / moe.granularity if moe.granularity > 1 or moe.shared else dense
    slices = routed_slices(moe)
    first = moe.granularity - slices + expert % slices
    return dense if moe.granularity == 1 else dense.chunk(moe.granularity, dim)[first]


def shared_part(name: str, dense: torch.Tensor, moe: Moe) -> torch.Tensor:
    """What the shared expert takes of the dense MLP's tensor `name`: the first slices.

    Where it holds them all, as the routed experts do, its output is half of the dense MLP's.
    """
    dim = _hidden(name)
    half = 0.5 if moe.shared == moe.granularity else 1.0
    if dim is None:
        return dense * (half * moe.shared / moe.granularity)
    part = dense.narrow(dim, 0, dense.shape[dim] // moe.granularity * moe.shared)
    return part * half if name.endswith("down.weight") else part


def grouped_rows(rows: torch.Tensor, moe: Moe) -> torch.Tensor:
    """A fresh router's rows [E, d] with those of each copy's slices equal to the copy's first."""
    slices = routed_slices(moe)
    return rows[::slices].repeat_interleave(slices, 0)


def upcycled(name: str, dense: torch.Tensor, expert: int, noise: float, seed: int) -> torch.Tensor:
    """Expert number `expert` (global) of target tensor `name`: `dense` or a slice, with noise of std noise * its std.

    The draw is keyed by (seed, name, expert), so any rank can make any expert alone. noise = 0 returns `dense` itself.
    """
    if noise == 0.0:
        return dense
    generator = torch.Generator().manual_seed(derive(seed, "upcycle", name, expert))
    draw = torch.randn(dense.shape, generator=generator).to(dense.dtype)
    return dense + draw * (noise * dense.float().std(correction=0)).to(dense.dtype)
