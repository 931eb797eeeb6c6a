"""Co-upcycling (arXiv:2212.05055, CuMo arXiv:2405.05949): which dense tensor each tensor of a sparse model copies.

A pure map from names to names, used tensor by tensor, so that no model ever stands whole in memory.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mmtrain.config.seed import derive

_EXPERTS = re.compile(r"(?P<mlp>.+\.mlp)\.experts\.(?P<layer>up|gate|down)(?P<bias>_bias)?")


@dataclass(frozen=True)
class Copy:
    """The tensor is the source's tensor `name`."""

    name: str


@dataclass(frozen=True)
class Experts:
    """Every expert of the tensor is the source's dense tensor `name`."""

    name: str


@dataclass(frozen=True)
class Fresh:
    """The source has nothing for the tensor: it starts by muP's rule."""


Origin = Copy | Experts | Fresh


def source_of(name: str, source_names: Collection[str]) -> Origin:
    """Where tensor `name` of the target comes from, given the names of the source's tensors.

    The same name wins; an expert tensor comes from the dense MLP in its place; a router has no dense counterpart.
    """
    if name in source_names:
        return Copy(name)
    match = _EXPERTS.fullmatch(name)
    if match is None:
        return Fresh()
    dense = f"{match['mlp']}.{match['layer']}.{'bias' if match['bias'] else 'weight'}"
    return Experts(dense) if dense in source_names else Fresh()


def upcycled(name: str, dense: torch.Tensor, expert: int, noise: float, seed: int) -> torch.Tensor:
    """Expert number `expert` (global) of target tensor `name`: `dense`, with noise of std noise * std(dense).

    The draw is keyed by (seed, name, expert), so any rank can make any expert alone. noise = 0 returns `dense` itself.
    """
    if noise == 0.0:
        return dense
    generator = torch.Generator().manual_seed(derive(seed, "upcycle", name, expert))
    draw = torch.randn(dense.shape, generator=generator).to(dense.dtype)
    return dense + draw * (noise * dense.float().std(correction=0)).to(dense.dtype)
