"""One optimizer step on any layout: forward, backward, update; what to save, and how to put it back.

    engine = Engine.build(model_on_meta, recipe, groups, make_groups, make)
    for batch in micro_batches:
        losses = engine.forward(batch, inputs)
        engine.backward(losses.total, last=batch is micro_batches[-1])
    update = engine.step(lr_factor)

Losses are sums over the rank's packs, divided by constants of the global batch, so their sum over ranks and
micro-batches is the loss. DeepSpeed averages gradients over data ranks; multiplying a rank's loss by their number, here,
is the only place where anything is scaled. Norm, verdict and clipping are ours too, one code for all stages.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mmtrain.config.schema import PARTS, Optim, Recipe
from mmtrain.model.stepio import BatchLike, Losses, StepInputs
from mmtrain.parallel.box import Box, Kind, Piece
from mmtrain.parallel.groups import Groups
from mmtrain.parallel.libraries import deepspeed
from mmtrain.parallel.marker import ExpertMarker, mark_experts
from mmtrain.parallel.materialize import Make, fill
from mmtrain.parallel.tensor import Layout, parameters, shard
from mmtrain.parallel.zero_config import zero_config
from mmtrain.parallel.zero_state import Shard, write_whole, zero_state

MakeGroups = Callable[[dict[str, nn.Parameter]], list[dict[str, Any]]]
"""This rank's parameters by name -> optimizer groups (mmtrain.optim.param_groups)."""

Read = Callable[[str, Kind, Box, tuple[int, int]], torch.Tensor]
"""(name, kind, box of the global tensor, range of the box's elements) -> those elements, fp32, 1-D."""


class Norms(NamedTuple):
    """Gradient norms of a step, before clipping; the same on every rank."""

    grad_norm: float
    """Of all gradients."""
    part_norms: dict[str, float]
    """Of each part that learns."""


class Update(NamedTuple):
    """What one step did."""

    grad_norm: float
    """Norm of all gradients, before clipping; the same on every rank."""
    part_norms: dict[str, float]
    """The same for each part that learns."""
    applied: bool
    """False where the norm was not finite: then nothing changed, on any rank."""


@dataclass(frozen=True)
class _Frozen:
    """This rank's share of a parameter that does not learn, kept in fp32 for checkpoints."""

    parameter: nn.Parameter
    start: int
    values: torch.Tensor


class Engine:
    """A model, cut for this rank, with DeepSpeed's optimizer. Build it with `Engine.build`."""

    def __init__(self, engine: Any, recipe: Recipe, groups: Groups, layout: Layout, frozen: dict[str, _Frozen]) -> None:
        self._engine = engine
        self._groups = groups
        self._optim = recipe.optim
        self._layout = layout
        self._frozen = frozen
        self._whole = recipe.parallel.zero_stage == 0
        offload = recipe.parallel.offload_optimizer
        stage = engine.zero_optimization_stage()
        names = {id(parameter): name for name, parameter in parameters(engine.module)}
        self._state = zero_state(stage, engine, names, offload)
        self._part = {name: group["part"] for group in engine.optimizer.param_groups for name in group["names"]}
        self._parts = [part for part in PARTS if part in self._part.values()]
        self._expert = {name for group in engine.optimizer.param_groups if group["expert"] for name in group["names"]}
        self._norms: Norms | None = None  # of the step under way
        self.updates = 0
        """Updates applied since the weights were new: Adam's step count, saved and loaded with the moments."""

    @classmethod
    def build(cls, model: nn.Module, recipe: Recipe, groups: Groups, make_groups: MakeGroups, make: Make) -> "Engine":
        """Cut `model` (on the meta device) for this rank, fill it by `make`, and hand it to DeepSpeed.

        make_groups  called once with this rank's parameters; those in no group are frozen.
        make         called once for every parameter, with its global name and this rank's box; fp32 values.
        """
        config = zero_config(recipe.parallel, groups.mesh)
        layout = shard(model, groups)
        optimizer_groups = make_groups(dict(parameters(model)))
        trainable = {name for group in optimizer_groups for name in group["names"]}
        for name, parameter in parameters(model):
            parameter.requires_grad_(name in trainable)
        mark_experts(model, optimizer_groups, groups)
        frozen: dict[str, _Frozen] = {}
        partition = _Partition(config, groups) if config["zero_optimization"]["stage"] == 3 else None

        def keep(name: str, parameter: nn.Parameter) -> None:
            parameter.ds_optim_param = True  # DeepSpeed's broadcast of the model: each rank has made the same values
            if name not in trainable:
                start, stop = _share(groups, ".experts." in name, parameter.numel())
                values = parameter.detach().view(-1)[start:stop].to("cpu", copy=True)
                frozen[name] = _Frozen(parameter, start, values)
            if partition is not None:
                partition(parameter)

        fill(model, layout, make, groups.device, keep)
        engine = _initialize(model, recipe, groups, config, optimizer_groups)
        return cls(engine, recipe, groups, layout, frozen)

    def forward(self, batch: BatchLike, inputs: StepInputs) -> Losses:
        """The losses of this rank's micro-batch, with gradients."""
        return self._engine(batch, inputs)

    def evaluate(
        self, batch: BatchLike, inputs: StepInputs, logits_at: torch.Tensor | None = None, cache: Any = None
    ) -> Losses | torch.Tensor:
        """Losses without gradients, or with `logits_at` the logits there. All ranks of a data group must call it."""
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

    def step(self, lr_factor: float) -> Update:
        """Update the parameters at lr_factor times the peak rates, unless some gradient is not finite (then discard)."""
        grad_norm, norms = self.norms()
        if not math.isfinite(grad_norm):
            self.discard()
            return Update(grad_norm, norms, applied=False)
        clip = self._optim.clip
        if clip > 0 and grad_norm + CLIP_EPS > clip:
            for _, gradient in self._state.gradients():
                gradient.mul_(clip / (grad_norm + CLIP_EPS))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed left out an update whose norm is finite; its verdict should be ours")
        self.updates += 1
        self._norms = None
        return Update(grad_norm, norms, applied=True)

    def discard(self) -> None:
        """Drop the gradients accumulated so far. Parameters, moments, step count and rates stay, to the bit."""
        self._state.discard()
        self._norms = None

    def norms(self) -> Norms:
        """After the last backward of a step: its gradient norms, known before any update. Collective."""
        if self._norms is None:
            by_part = self._part_norms()
            self._norms = Norms(math.sqrt(sum(norm**2 for norm in by_part.values())), by_part)
        return self._norms

    def _part_norms(self) -> dict[str, float]:
        """Gradient norm by part. Each element counts once: replicas over tensor (and, unsharded, data) ranks do not."""
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self._groups.device)
        by_part: dict[str, list[torch.Tensor]] = {part: [] for part in self._parts}
        for name, gradient in self._state.gradients():
            if self._counts(name):
                by_part[self._part[name]].append(gradient)
        for i, part in enumerate(self._parts):
            if by_part[part]:
                squares[i] = torch.stack(torch._foreach_norm(by_part[part])).double().square().sum()
        self._groups.sum_over_world(squares)
        return {part: math.sqrt(value) for part, value in zip(self._parts, squares.tolist(), strict=True)}

    def _counts(self, name: str) -> bool:
        """Whether this rank speaks for parameter `name` among the tensor (and data) ranks that hold the same values."""
        groups = self._groups
        if self._whole and groups.data_rank:
            return False
        return groups.tensor_rank == 0 or self._is_cut(name)

    def _is_cut(self, name: str) -> bool:
        """Whether tensor ranks hold different elements of `name`."""
        return getattr(self._parameter(name), "tensor_cut", False)

    def _parameter(self, name: str) -> nn.Parameter:
        return self._engine.module.get_parameter(name)

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes: over all ranks, each element of each tensor once. Views of live memory."""
        for shard_ in self._state.shards():
            if not self._counts_for_saving(shard_.name):
                continue
            for kind, tensor in self._tensors(shard_.holder):
                start, stop = shard_.start, shard_.stop
                if self._whole:
                    start, stop = _share(self._groups, shard_.name in self._expert, stop)
                yield from self._piece(
                    shard_.name, kind, start, shard_.of(tensor)[start - shard_.start : stop - shard_.start]
                )
        for name, frozen in self._frozen.items():
            if self._counts_for_saving(name):
                yield from self._piece(name, "param", frozen.start, frozen.values)

    def _counts_for_saving(self, name: str) -> bool:
        return self._groups.tensor_rank == 0 or self._is_cut(name)

    def _tensors(self, holder: torch.Tensor) -> Iterator[tuple[Kind, torch.Tensor]]:
        """Master and moments of one holder."""
        yield "param", holder
        state = self._torch_optimizer().state.get(holder, {})
        for kind in MOMENTS:
            if kind in state:
                yield kind, state[kind]

    def _piece(self, name: str, kind: Kind, start: int, values: torch.Tensor) -> Iterator[Piece]:
        """The piece of elements [start, start + len(values)) of a parameter, without the vocabulary's padding."""
        placement = self._layout[name]
        stop = min(start + values.numel(), placement.real.numel)
        if start < stop:
            step = self.updates if kind in MOMENTS else 0
            yield Piece(name, kind, placement.shape, placement.real, (start, stop), values[: stop - start], step)

    def load(self, read: Read, updates: int) -> None:
        """Take every parameter, and with `updates` > 0 the moments, from `read`; then go on as if never stopped.

        updates  how many updates the saved moments have seen (Piece.step).
        """
        optimizer = self._torch_optimizer()
        self.updates = updates
        with torch.no_grad():
            for shard_ in self._state.shards():
                self._restore(read, shard_, "param", shard_.holder)
                if updates and isinstance(optimizer, torch.optim.AdamW):
                    state = _adam_state(optimizer, shard_.holder, updates)
                    for kind in MOMENTS:
                        self._restore(read, shard_, kind, state[kind])
            self._state.refresh()
            for name, frozen in self._frozen.items():
                self._restore_frozen(read, name, frozen)

    def _restore(self, read: Read, shard_: Shard, kind: Kind, tensor: torch.Tensor) -> None:
        real = self._layout[shard_.name].real
        stop = min(shard_.stop, real.numel)
        if shard_.start < stop:
            values = read(shard_.name, kind, real, (shard_.start, stop))
            shard_.of(tensor)[: stop - shard_.start].copy_(values)

    def _restore_frozen(self, read: Read, name: str, frozen: _Frozen) -> None:
        placement = self._layout[name]
        whole = torch.zeros(placement.box.numel)
        whole[: placement.real.numel] = read(name, "param", placement.real, (0, placement.real.numel))
        frozen.values.copy_(whole[frozen.start : frozen.start + frozen.values.numel()])
        write_whole(frozen.parameter, whole)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self._engine.basic_optimizer


MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def _share(groups: Groups, expert: bool, numel: int) -> tuple[int, int]:
    """This rank's part of `numel` elements that all its data (for experts: replica) ranks hold."""
    index, count = groups.data_rank, groups.data_size
    if expert:
        index, count = groups.mesh.replica(groups.rank), groups.mesh.replicas
    return numel * index // count, numel * (index + 1) // count


class _Partition:
    """ZeRO-3: turns a filled parameter into this rank's share at once, so that the model is never whole anywhere."""

    def __init__(self, config: dict[str, Any], groups: Groups) -> None:
        self._config = config
        self._groups = groups
        self._first: nn.Parameter | None = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        self._first = parameter
        holder = nn.ParameterList([parameter])
        dtype = torch.bfloat16 if "bf16" in self._config else torch.float32
        deepspeed.zero.Init(
            module=holder,
            data_parallel_group=self._groups.data,
            config_dict_or_path=self._config,
            dtype=dtype,
            mpu=self._groups.mpu,
        )


def _initialize(
    model: nn.Module, recipe: Recipe, groups: Groups, config: dict[str, Any], optimizer_groups: list[dict[str, Any]]
) -> Any:
    """deepspeed.initialize with our optimizer over our groups."""
    filled = dict(parameters(model))
    expert = groups.mesh.expert
    settings = []
    for group in optimizer_groups:
        settings.append({**group, "params": [filled[name] for name in group["names"]], "peak": group["lr"]})
        if group["expert"] and expert > 1:
            settings[-1] |= {"moe": True, "name": ExpertMarker.group_name(expert)}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(recipe.optim, settings),
        config=config,
        mpu=groups.mpu,
        dist_init_required=False,
    )
    return engine


def _optimizer(optim: Optim, settings: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed wraps."""
    if optim.name == "adamw":
        return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    return torch.optim.SGD(settings, lr=optim.lr)


def _adam_state(optimizer: torch.optim.Optimizer, holder: torch.Tensor, updates: int) -> dict[str, torch.Tensor]:
    """AdamW's state of `holder` after `updates` updates, made where the optimizer has not stepped yet."""
    state = optimizer.state[holder]
    if not state:
        state["step"] = torch.tensor(0.0)
        state.update({kind: torch.zeros_like(holder) for kind in MOMENTS})
    state["step"].fill_(float(updates))
    return state
