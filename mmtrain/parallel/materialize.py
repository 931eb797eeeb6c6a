"""Gives a cut model on the meta device its values, one tensor at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmtrain.parallel.box import Box
from mmtrain.parallel.groups import Groups
from mmtrain.parallel.libraries import deepspeed
from mmtrain.parallel.tensor import Layout, parameters

Make = Callable[[str, Box], torch.Tensor]
"""(global name, box of the global tensor without padding) -> its values, fp32."""

Keep = Callable[[str, nn.Parameter], None]
"""Takes a parameter that has just got its values, e.g. keeps only ZeRO-3's share of it."""


def fill(model: nn.Module, layout: Layout, make: Make, device: torch.device, keep: Keep | None = None) -> None:
    """Fill every parameter: `make` its box, pad the vocabulary with zeros, put it on `device`, hand it to `keep`.

    At any time this process holds what it keeps and one tensor more.
    ValueError where a value does not have its box's shape, or where a buffer is left without values.
    """
    for name, parameter in list(parameters(model)):  # a list: filling a tied weight replaces it where it stands twice
        placement = layout[name]
        value = make(name, placement.real)
        if tuple(value.shape) != placement.real.shape:
            raise ValueError(f"{name}: the box is {placement.real.shape}, the values made for it {tuple(value.shape)}")
        value = _padded(value.to(device=device, dtype=torch.float32), placement.box)
        filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
        filled.__dict__.update(parameter.__dict__)
        _put(model, parameter, filled)
        if keep is not None:
            keep(name, filled)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise ValueError(f"buffers {left} have no values: a model keeps all its state in parameters")


def _padded(value: torch.Tensor, box: Box) -> torch.Tensor:
    """`value` with rows of zeros up to the box's shape, in memory of its own."""
    if tuple(value.shape) == box.shape:
        return value.clone(memory_format=torch.contiguous_format)
    out = value.new_zeros(box.shape)
    out[: value.shape[0]] = value
    return out


def _put(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Replace a parameter wherever it stands; a tied one stands twice."""
    for module in model.modules():
        for child, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[child] = new


class Partition:
    """ZeRO-3: turns a filled parameter into this rank's share at once, so that the model is whole nowhere."""

    def __init__(self, config: dict[str, Any], groups: Groups) -> None:
        """config: DeepSpeed's."""
        self._config, self._groups = config, groups
        self._dtype = torch.bfloat16 if "bf16" in config else torch.float32
        self._first: nn.Parameter | None = None

    def __call__(self, parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(self._dtype)  # zero.Init takes the dtype as it is, whatever it is told
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        self._first = parameter
        deepspeed.zero.Init(
            module=nn.ParameterList([parameter]),
            data_parallel_group=self._groups.data,
            config_dict_or_path=self._config,
            dtype=self._dtype,
            mpu=self._groups.mpu,
        )
