"""Where a stage's weights start: muP's initial values, another checkpoint of ours, a pretrained Hugging Face folder for
a part, or dense MLPs copied into experts.

Everything here makes one tensor, or this rank's box of it, at a time.
"""

import math
from pathlib import Path

import torch

from mmtrain.config.errors import CheckpointError, ConfigError
from mmtrain.config.load import load
from mmtrain.config.schema import PARTS, Moe, Recipe, Vision
from mmtrain.convert.source import Pretrained
from mmtrain.model.upcycle import (
    Experts,
    Shared,
    dense_shape,
    grouped_rows,
    routed_part,
    shared_part,
    source_of,
    upcycled,
)
from mmtrain.model.vision import interpolate_positions
from mmtrain.mup.init import initial, initial_expert
from mmtrain.mup.registry import Registry, is_expert
from mmtrain.mup.scales import forward_factors
from mmtrain.parallel.box import Box
from mmtrain.run.comm import Comm
from mmtrain.run.manifest import shortened
from mmtrain.run.reader import Reader, open_weights
from mmtrain.run.saver import RECIPE
from mmtrain.run.weights import plan_weights, section

ROUTER = ".router.weight"


def stored_shapes(registry: Registry) -> dict[str, tuple[int, ...]]:
    """Name -> global shape as a checkpoint holds it: without the rows that pad the vocabulary."""
    return {name: (entry.role.rows or entry.shape[0], *entry.shape[1:]) for name, entry in registry.entries.items()}


class Weights:
    """Makes any box of any tensor of a recipe's model, in fp32 on the CPU; the same values in every layout.

    `report` says, where there is an `init_from` or pretrained part, which tensors are loaded, upcycled, interpolated,
    fresh and unused, and which of a pretrained part no model here reads. With both, init_from alone is read.
    """

    def __init__(self, recipe: Recipe, registry: Registry, comm: Comm, going_on: bool = False) -> None:
        """ConfigError, CheckpointError: init_from or a pretrained folder does not fit.

        going_on    a checkpoint of the run itself will replace every value: nothing is read, it may be gone by now
        """
        self._recipe, self._registry = recipe, registry
        shapes = stored_shapes(registry)
        self._source: Reader | Pretrained | None = None
        self.label = self.report = ""
        if going_on:
            return
        if recipe.init_from:
            self._source, self.label = open_weights(Path(recipe.init_from), comm), recipe.init_from
        elif any(getattr(recipe.model, part).pretrained for part in PARTS):
            self._source = Pretrained(recipe.model)
            self.label = self._source.label
        if self._source is not None:
            given = self._source.shapes()
            origins = {name: source_of(name, given) for name in shapes}
            made = {
                name: (origin.name, dense_shape(origin, shapes[name], self._moe(name)))
                for name, origin in origins.items()
                if isinstance(origin, Experts | Shared)
            }
            label = "init_from" if recipe.init_from else self.label
            self._plan = plan_weights(shapes, given, made, label=label)
            self._check_upcycle()
            self._check_pretrained()
            self._check_factors()
            self.report = self._plan.report(shapes, given)
            if isinstance(self._source, Pretrained) and self._source.unread:
                self.report += "\n" + section("never read", self._source.unread)

    def _check_upcycle(self) -> None:
        """Dense MLPs become experts in the parts that the recipe names, and nowhere else."""
        parts = {name.partition(".")[0] for name in self._plan.upcycled}
        if unnamed := sorted(part for part in parts if getattr(self._recipe.upcycle, part) is None):
            what = "init_from " if self._recipe.init_from else ""
            raise ConfigError(
                f"{what}{self.label} is dense where the recipe has experts in {', '.join(unnamed)}: "
                f"name them to copy its MLPs into experts, e.g. upcycle.{unnamed[0]}.noise=0"
            )

    def _check_pretrained(self) -> None:
        """A pretrained part takes every weight but routers, and leaves none but what the model cuts off."""
        if not isinstance(self._source, Pretrained):
            return
        parts = self._source.parts
        fresh = [name for name in self._plan.fresh if name.partition(".")[0] in parts and ".router." not in name]
        lost = [name for name in self._plan.unused if not name.startswith("vision.blocks.")]  # behind select_layer
        if fresh or lost:
            raise CheckpointError(
                f"{self.label}: {len(fresh)} weights of the model have no tensor there ({shortened(fresh) or 'none'}), "
                f"{len(lost)} tensors no weight in the model ({shortened(lost) or 'none'}). Make the recipe's model "
                "that of its config.json."
            )

    def _check_factors(self) -> None:
        """The parts that init_from gives compute what they did there: muP's factors of the forward are not weights."""
        if not isinstance(self._source, Reader):
            return
        parent = load(self._source.folder / RECIPE)
        there = forward_factors(parent.model, parent.mup)
        here = forward_factors(self._recipe.model, self._recipe.mup)
        plan = self._plan
        taken = {name.partition(".")[0] for name in (*plan.loaded, *plan.upcycled, *plan.interpolated)}
        differing = [
            f"{name} {there[name]:.4g} there, {factor:.4g} here"
            for name, factor in here.items()
            if name in there and name.rpartition(" ")[2] in taken and not math.isclose(there[name], factor)
        ]
        if differing:
            raise ConfigError(
                f"init_from {self.label} was trained with other factors in its forward ({'; '.join(differing)}): the "
                "same weights would compute another function here. Train it with this recipe's mup.base, multipliers "
                "and head sizes, or take its own; a part that was trained without mup.base has its own widths as base: "
                "leave it out of mup.base"
            )

    def make(self, name: str, box: Box) -> torch.Tensor:
        """Values of `box` of tensor `name`."""
        if self._source is not None:
            if name in self._plan.loaded:
                return self._source.read(self._plan.loaded[name], box=box).float()
            if name in self._plan.upcycled:
                return self._experts(name, box) if is_expert(name) else self._shared(name, box)
            if name in self._plan.interpolated:
                return self._positions(name)[box.slices()]
            if name.removesuffix(ROUTER) + ".experts.up" in self._plan.upcycled:
                whole = self._drawn(name, Box.whole(self._registry[name].shape))
                return grouped_rows(whole, self._moe(name))[box.slices()]
        return self._drawn(name, box)

    def _drawn(self, name: str, box: Box) -> torch.Tensor:
        """Initial values by muP's rule."""
        entry, seed = self._registry[name], self._recipe.seed
        if is_expert(name):
            shape, inner = entry.shape[1:], box.slices()[1:]
            numbers = range(box.start[0], box.stop[0])
            return torch.stack([initial_expert(name, entry, shape, expert, seed)[inner] for expert in numbers])
        return initial(name, entry, entry.shape, seed)[box.slices()]

    def _moe(self, name: str) -> Moe:
        """The experts of the tensor's part."""
        return getattr(self._recipe.model, name.partition(".")[0]).moe

    def _experts(self, name: str, box: Box) -> torch.Tensor:
        """This rank's experts, each a copy or a slice of the dense tensor, cut along the other dimensions."""
        origin, moe = self._plan.upcycled[name], self._moe(name)
        dense = self._source.read(origin).float()
        noise = getattr(self._recipe.upcycle, name.partition(".")[0]).noise
        out = torch.empty(box.shape)  # filled one by one: a list and its stack would be all experts twice
        for row, expert in zip(out, range(box.start[0], box.stop[0]), strict=True):
            part = routed_part(origin, dense, expert, moe)
            row.copy_(upcycled(name, part, expert, noise, self._recipe.seed)[box.slices()[1:]])
        return out

    def _shared(self, name: str, box: Box) -> torch.Tensor:
        """This rank's box of a shared expert's tensor."""
        origin = self._plan.upcycled[name]
        return shared_part(origin, self._source.read(origin).float(), self._moe(name))[box.slices()]

    def _positions(self, name: str) -> torch.Tensor:
        """Positions of the source's grid on this model's grid."""
        parent = self._parent_vision()
        vision = self._recipe.model.vision
        old = self._source.read(self._plan.interpolated[name]).float()
        return interpolate_positions(old, parent.grid(), vision.grid(), vision.class_token)

    def _parent_vision(self) -> Vision:
        """The source's image tower."""
        if isinstance(self._source, Pretrained):
            return self._source.vision
        return load(self._source.folder / RECIPE).model.vision
