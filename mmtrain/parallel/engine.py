"""One optimizer step on any layout: forward, backward, update; what to save, and how to put it back.

    engine = Engine.build(model_on_meta, recipe, groups, make_groups, make)
    for batch in micro_batches:
        losses = engine.forward(batch, inputs)
        engine.backward(losses.total, last=batch is micro_batches[-1])
    norms = engine.norms()
    engine.step(lr_factor)                      # or engine.discard()

Losses are sums over the rank's packs, divided by constants of the global batch, so their sum over ranks and
micro-batches is the loss. DeepSpeed averages gradients over data ranks: multiplying a rank's loss by their number,
here, is the only place where anything is scaled. Norm, verdict and clipping are ours too, one code for all stages.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from mmtrain.config.schema import PARTS, Recipe
from mmtrain.model.attention import KVCache
from mmtrain.model.probe import KINDS, GradientProbe
from mmtrain.model.stepio import BatchLike, Losses, StepInputs
from mmtrain.parallel.box import Piece
from mmtrain.parallel.groups import Groups
from mmtrain.parallel.libraries import deepspeed
from mmtrain.parallel.marker import ExpertMarker, mark_experts, place_experts
from mmtrain.parallel.materialize import Make, Partition, fill
from mmtrain.parallel.optimizer import make_optimizer
from mmtrain.parallel.sequence import split_sequence
from mmtrain.parallel.tensor import Layout, parameters, shard
from mmtrain.parallel.transfer import Frozen, Read, Transfer
from mmtrain.parallel.zero_config import zero_config
from mmtrain.parallel.zero_state import zero_state

MakeGroups = Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]]
"""This rank's parameters by name -> optimizer groups (mmtrain.optim.groups.param_groups)."""

CLIP_EPS = 1e-6
"""Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does."""


EXPERTS, ROUTER, DENSE = "experts", "router", "dense"


def sort_of(name: str) -> str:
    """Which gradients parameter `name` is measured with, inside its part."""
    return EXPERTS if ".experts." in name else ROUTER if ".router." in name else DENSE


class Norms(NamedTuple):
    """Gradient norms of a step over the global batch, before clipping; the same on every rank."""

    grad_norm: float
    """Of all gradients; not finite when any gradient is not."""
    part_norms: dict[str, float]
    """Of each part that learns."""
    expert_norms: dict[str, float]
    """Of each part's experts, where some learn; they are in part_norms too."""
    router_norms: dict[str, float]
    """Of each part's routers, where some learn; they are in part_norms too."""
    position_norms: dict[str, float]
    """Of the loss gradient at the decoder's input, over its text and over its image positions; {} without a probe."""


class Update(NamedTuple):
    """What one step did."""

    grad_norm: float
    """See Norms."""
    part_norms: dict[str, float]
    """See Norms."""
    applied: bool
    """False where the norm was not finite: then nothing changed, on any rank."""


class Engine:
    """A model, cut for this rank, with DeepSpeed's optimizer. Build it with `Engine.build`."""

    def __init__(
        self,
        engine: Any,
        recipe: Recipe,
        groups: Groups,
        layout: Layout,
        frozen: dict[str, Frozen],
        on_runs: set[str],
    ) -> None:
        """engine: an initialised DeepSpeed engine around the cut and filled model. on_runs: see split_sequence."""
        self._engine, self._groups, self._optim = engine, groups, recipe.optim
        self._whole = engine.zero_optimization_stage() == 0
        names = {id(parameter): name for name, parameter in parameters(engine.module)}
        stage, offload = engine.zero_optimization_stage(), recipe.parallel.offload_optimizer
        self._state = zero_state(stage, engine, names, offload)
        self._part = {name: group["part"] for group in engine.optimizer.param_groups for name in group["names"]}
        self._cut = {name for name, parameter in parameters(engine.module) if parameter.tensor_cut}
        self._transfer = Transfer(groups, layout, self._state, engine.basic_optimizer, frozen, self._whole, self._cut)
        self._on_runs = on_runs
        self._norms: Norms | None = None
        self.updates = 0
        """Updates applied since the weights were new: Adam's step count, saved and loaded with the moments."""

    @classmethod
    def build(cls, model: nn.Module, recipe: Recipe, groups: Groups, make_groups: MakeGroups, make: Make) -> "Engine":
        """Cut `model` (on the meta device) for this rank, fill it by `make`, and hand it to DeepSpeed.

        make_groups  called once with this rank's parameters; those in no group are frozen.
        make         called once for every parameter, with its global name and this rank's box; fp32 values.
        ConfigError where the layout does not fit the model, or is one that DeepSpeed gets wrong.
        """
        config = zero_config(recipe.parallel, groups.mesh)
        layout = shard(model, groups)
        on_runs = split_sequence(model, groups.tensor) if recipe.parallel.sequence_parallel else set()
        optimizer_groups = make_groups(dict(parameters(model)))
        learning = {name for group in optimizer_groups for name in group["names"]}
        for name, parameter in parameters(model):
            parameter.requires_grad_(name in learning)
            parameter.ds_optim_param = True  # keeps DeepSpeed from broadcasting it: each rank makes the same values
        frozen: dict[str, Frozen] = {}
        partition = None
        if config["zero_optimization"]["stage"] == 3:
            place_experts(model, groups)
            partition = Partition(config, groups)
        else:
            mark_experts(model, optimizer_groups, groups)

        def keep(name: str, parameter: nn.Parameter) -> None:
            if name not in learning:
                frozen[name] = Frozen.of(name, parameter, groups)
            if partition is not None:
                partition(parameter)

        fill(model, layout, make, groups.device, keep)
        engine = _initialize(model, recipe, groups, config, optimizer_groups)
        return cls(engine, recipe, groups, layout, frozen, on_runs)

    def forward(self, batch: BatchLike, inputs: StepInputs) -> Losses:
        """The losses of this rank's micro-batch, with gradients."""
        return self._engine(batch, inputs)

    def evaluate(
        self,
        batch: BatchLike,
        inputs: StepInputs,
        logits_at: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Losses | torch.Tensor:
        """Losses without gradients, or with `logits_at` the logits there. All ranks must call it equally often."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return self._engine(batch, inputs, logits_at, cache)
        finally:
            self._engine.train()

    def backward(self, total: torch.Tensor, last: bool) -> None:
        """Add the gradients of `total` to the step's. last: whether this is the step's last micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(total * self._groups.data_size, scale_wrt_gas=False)

    def norms(self, probe: GradientProbe | None = None) -> Norms:
        """Norms of the step's gradients, after its last backward. A collective of all ranks at the first call.

        probe   that of the step's inputs, on every rank or on none; read at the first call.
        """
        if self._norms is None:
            self._join_runs()
            squares, positions = self._squares(probe)
            parts = {part: 0.0 for part in PARTS if part in self._part.values()}
            for (part, _), square in squares.items():
                parts[part] += square

            def of(sort: str) -> dict[str, float]:
                return {part: math.sqrt(square) for (part, own), square in squares.items() if own == sort}

            self._norms = Norms(
                grad_norm=math.sqrt(sum(parts.values())),
                part_norms={part: math.sqrt(square) for part, square in parts.items()},
                expert_norms=of(EXPERTS),
                router_norms=of(ROUTER),
                position_norms={} if probe is None else positions,
            )
        return self._norms

    def step(self, lr_factor: float) -> Update:
        """Clip, and update the parameters at lr_factor times the peak rates; discard where a gradient is not finite."""
        norms = self.norms()
        if not math.isfinite(norms.grad_norm):
            self.discard()
            return Update(norms.grad_norm, norms.part_norms, applied=False)
        self._clip(norms)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed left out an update whose norm is finite; the verdict should be ours alone")
        self._norms = None
        self.updates += 1
        return Update(norms.grad_norm, norms.part_norms, applied=True)

    def _clip(self, norms: Norms) -> None:
        """Scale down the gradients whose norm, all together or by part, is above the limit."""
        limit = self._optim.clip
        if limit <= 0:
            return
        whole = self._optim.clip_scope == "global"
        bounds = {part: (norms.grad_norm if whole else norm) + CLIP_EPS for part, norm in norms.part_norms.items()}
        if max(bounds.values()) <= limit:
            return
        for name, gradient in self._state.gradients():
            bound = bounds[self._part[name]]
            if bound > limit:
                gradient.mul_(limit / bound)

    def _join_runs(self) -> None:
        """Sum over the tensor group what each of its ranks has from its own positions alone."""
        own = [gradient for name, gradient in self._state.gradients() if name in self._on_runs]
        if not own:
            return
        total = torch.cat([gradient.flatten() for gradient in own]).to(self._groups.device)
        dist.all_reduce(total, group=self._groups.tensor)
        for gradient, joined in zip(own, total.split([gradient.numel() for gradient in own]), strict=True):
            gradient.copy_(joined.view_as(gradient))

    def discard(self) -> None:
        """Drop the gradients accumulated so far. Parameters, moments, step count and rates stay, to the bit."""
        self._norms = None
        self._state.discard()

    def _squares(self, probe: GradientProbe | None) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
        """(part, sort) -> squared gradient norm, and token kind -> norm at the decoder's input.

        Each element counts once: replicas over tensor (and, in ZeRO-0, data) ranks do not.
        """
        groups = self._groups
        present = {(part, sort_of(name)) for name, part in self._part.items()}
        keys = [key for key in product(PARTS, (EXPERTS, ROUTER, DENSE)) if key in present]
        held: dict[tuple[str, str], list[torch.Tensor]] = {key: [] for key in keys}
        speaks = not self._whole or groups.data_rank == 0
        for name, gradient in self._state.gradients():
            if speaks and (groups.tensor_rank == 0 or name in self._cut):
                held[self._part[name], sort_of(name)].append(gradient)
        squares = torch.zeros(len(held) + len(KINDS), dtype=torch.float64, device=groups.device)
        for number, gradients in enumerate(held.values()):
            if gradients:
                squares[number] = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if probe is not None and groups.tensor_rank == 0:
            squares[len(held) :] = probe.squares() / groups.data_size**2  # backward multiplied the loss
        found = groups.sum_over_world(squares).tolist()
        positions = {
            kind.name.lower(): math.sqrt(square) for kind, square in zip(KINDS, found[len(held) :], strict=True)
        }
        return dict(zip(held, found, strict=False)), positions

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes: over all ranks, each element of each tensor once. Views of live memory."""
        return self._transfer.pieces(self.updates)

    def load(self, read: Read, updates: int) -> None:
        """Take all parameters, and the moments that have seen `updates` updates, from `read`; any layout wrote them."""
        self._transfer.load(read, updates)
        self.updates = updates


def _initialize(
    model: nn.Module, recipe: Recipe, groups: Groups, config: dict[str, Any], optimizer_groups: list[dict[str, Any]]
) -> Any:
    """deepspeed.initialize with our optimizer over our groups."""
    filled = dict(parameters(model))
    marked = groups.mesh.expert > 1 and recipe.parallel.zero_stage < 3
    settings = []
    for group in optimizer_groups:
        settings.append({**group, "params": [filled[name] for name in group["names"]], "peak": group["lr"]})
        if group["expert"] and marked:
            settings[-1] |= {"moe": True, "name": ExpertMarker.group_name(groups.mesh.expert)}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(recipe.optim, settings, groups.device),
        config=config,
        mpu=groups.mpu,
        dist_init_required=False,
    )
    return engine
