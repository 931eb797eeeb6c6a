"""Initial values: one tensor at a time, each from a generator keyed by (seed, name), so that no layout changes them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtrain.config.seed import derive
from mmtrain.mup.registry import Entry, Registry, is_expert


def initial(name: str, entry: Entry, shape: Sequence[int], seed: int) -> Tensor:
    """The whole tensor `name` at its start: fp32, on the CPU, of the unsharded `shape`.

    Rows beyond entry.role.rows (padding of the vocabulary) are zero. Experts are drawn one by one, by `initial_expert`.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    if is_expert(name):
        for expert in range(out.shape[0]):
            out[expert] = initial_expert(name, entry, shape[1:], expert, seed)
        return out
    _fill(out, entry, derive(seed, "init", name))
    if entry.role.rows is not None:
        out[entry.role.rows :] = 0.0
    return out


def initial_expert(name: str, entry: Entry, shape: Sequence[int], expert: int, seed: int) -> Tensor:
    """Slice `expert` (global number) of tensor `name`, of `shape` without the expert dimension: fp32, on the CPU."""
    out = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    _fill(out, entry, derive(seed, "init", name, expert))
    return out


def initialize(model: nn.Module, registry: Registry, seed: int) -> None:
    """Fill every parameter of a model that lies whole in this process."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, registry[name], parameter.shape, seed))


def _fill(out: Tensor, entry: Entry, seed: int) -> None:
    if entry.role.init == "normal":
        out.normal_(0.0, entry.init_std, generator=torch.Generator().manual_seed(seed))
    else:
        out.fill_(1.0 if entry.role.init == "ones" else 0.0)
