"""Base-shape files (.bsh) of PyPI `mup`: for each parameter the base size of each dimension, null where it is no width.

The library is unmaintained and labels live tensors, so training never needs it; its file is the common way to state a
base, and its rules are the test oracle for the shapes that it supports.
"""

from pathlib import Path

from mup.shape import load_base_shapes, save_base_shapes, zip_infshapes
from torch import nn


def write_base_shapes(model: nn.Module, base: nn.Module, path: Path) -> None:
    """Write the base-shape file of `model` against `base`; both may be on the meta device."""
    shapes, base_shapes = _shapes(model), _shapes(base)
    save_base_shapes(zip_infshapes(base_shapes, shapes), str(path))


def read_base_shapes(path: Path) -> dict[str, tuple[int | None, ...]]:
    """Parameter name -> base size of each dimension, None where the dimension is no width."""
    return {name: tuple(shape.base_shape()) for name, shape in load_base_shapes(str(path)).items()}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
