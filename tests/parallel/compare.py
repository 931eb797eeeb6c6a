"""The reference's own run, and how far a layout's record is from it."""

import math
from dataclasses import dataclass

import torch

from mmtrain.config.schema import Recipe
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.optim.groups import hyperparameters
from mmtrain.optim.schedule import lr_factor
from tests import tiny
from tests.parallel import reference
from tests.parallel.harness import Record, parts_of, sparse, start_values

TOLERANCE = 1e-5


def is_rounding(name: str) -> bool:
    """Key biases without RoPE: they shift all scores of a query alike, so their gradient is 0 but for rounding."""
    return name.startswith("vision.") and name.endswith("attention.k.bias")


def whole_batch(recipe: Recipe, step: int) -> tuple[dict[str, torch.Tensor], list[tiny.Pack]]:
    """All packs of a step as one batch with valid images alone."""
    packs = tiny.packs(recipe.model, step)
    batch = {name: torch.stack([getattr(pack, name) for pack in packs]) for name in tiny.Pack._fields[:7]}
    batch["images"] = torch.cat([pack.images for pack in packs])
    batch["slots"] = torch.cat([pack.slots + number * tiny.SEQUENCE for number, pack in enumerate(packs)])
    return batch, packs


def reference_run(recipe: Recipe, steps: int, dtype: torch.dtype = torch.float64) -> Record:
    """`steps` steps of plain PyTorch."""
    _, registry = parts_of(recipe)
    scales = forward_scales(recipe.model, base_model_config(recipe.model, recipe.mup.base), recipe.mup)
    params = {name: start_values(registry, name).to(dtype) for name in registry.entries}
    hyper = {
        name: reference.Hyper(*hyperparameters(name, entry, recipe.optim), entry.part)
        for name, entry in registry.entries.items()
    }
    optimizer, record = reference.Optimizer(recipe, hyper), Record()
    load = {
        part: torch.full((layers, getattr(recipe.model, part).moe.num_experts), 1.0, dtype=dtype)
        for part, layers in sparse(recipe).items()
    }
    for step in range(steps):
        batch, packs = whole_batch(recipe, step)
        batch["weights"] = batch["weights"].to(dtype)
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        share = {part: value / value.sum(-1, keepdim=True) for part, value in load.items()}
        shares = reference.Shares(share, tiny.valid_tokens(recipe.model, packs))
        loss, routing = reference.forward(leaves, recipe, scales, batch, shares, tiny.label_weight(packs))
        loss.backward()
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        norm, parts = optimizer.step(params, grads, lr_factor(step + 1, recipe.optim, recipe.steps))
        load = {part: torch.stack(value) for part, value in routing.counts.items()}
        record.losses.append(float(loss.detach()))
        record.norms.append(norm)
        record.part_norms.append(parts)
        record.counts.append({part: value.float() for part, value in load.items()})
        record.margins.append(routing.margin)
        state = {("param", name): value.clone() for name, value in params.items()}
        record.state.append(state | {key: value.clone() for key, value in optimizer.moments.items()})
    return record


def _first_forward(recipe: Recipe, step: int):
    """Parameters (leaves, float64), batch, scales and shares of a first step."""
    _, registry = parts_of(recipe)
    scales = forward_scales(recipe.model, base_model_config(recipe.model, recipe.mup.base), recipe.mup)
    leaves = {name: start_values(registry, name).double().requires_grad_() for name in registry.entries}
    batch, packs = whole_batch(recipe, step)
    experts = {part: getattr(recipe.model, part).moe.num_experts for part in sparse(recipe)}
    load = {part: torch.full((sparse(recipe)[part], count), 1.0 / count) for part, count in experts.items()}
    shares = reference.Shares(load, tiny.valid_tokens(recipe.model, packs))
    return leaves, batch, scales, shares, tiny.label_weight(packs)


def reference_gradients(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """Gradients of a first step at the initial values, by name."""
    leaves, batch, scales, shares, weight = _first_forward(recipe, step)
    reference.forward(leaves, recipe, scales, batch, shares, weight)[0].backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def reference_logits(recipe: Recipe, step: int) -> torch.Tensor:
    """Logits [B * T, V] of a step's packs at the initial values."""
    leaves, batch, scales, shares, _ = _first_forward(recipe, step)
    with torch.no_grad():
        return reference.logits(leaves, recipe, scales, batch, shares, reference.Routing()).flatten(0, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, over the rows that both have."""
    a, b = a.double(), b.double()[: a.shape[0]] if b.dim() and a.shape[0] != b.shape[0] else b.double()
    scale = float(b.norm())
    difference = float((a - b).norm())
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


@dataclass
class Row:
    """One step of one layout against the reference."""

    step: int
    loss: float
    norm: float
    part_norm: float
    worst: dict[str, tuple[float, str]]
    ties: int

    def largest(self) -> float:
        """The largest difference of this step."""
        return max(self.loss, self.norm, self.part_norm, *(value for value, _ in self.worst.values()))

    def __str__(self) -> str:
        worst = "  ".join(f"{kind} {value:.1e} {name}" for kind, (value, name) in self.worst.items())
        return f"{self.step:4d}  loss {self.loss:.1e}  norm {self.norm:.1e}  part {self.part_norm:.1e}  {worst}"


def tail(record: Record, first: int) -> Record:
    """The record from step `first` (from 0) on."""
    return Record(**{name: values[first:] for name, values in vars(record).items()})


def compare(found: Record, wanted: Record) -> list[Row]:
    """One row a step. A choice of experts that differs is counted as a tie."""
    rows = []
    for step, state in enumerate(found.state):
        expected = wanted.state[step]
        assert state.keys() == expected.keys(), f"missing or surplus: {sorted(state.keys() ^ expected.keys())}"
        worst: dict[str, tuple[float, str]] = {}
        for (kind, name), value in state.items():
            if not is_rounding(name):
                worst[kind] = max(worst.get(kind, (0.0, "")), (distance(value, expected[kind, name]), name))
        ties = sum(
            int((found.counts[step][part] - value).abs().sum()) // 2 for part, value in wanted.counts[step].items()
        )
        relative = [abs(found.part_norms[step][part] / value - 1) for part, value in wanted.part_norms[step].items()]
        rows.append(
            Row(
                step + 1,
                abs(found.losses[step] / wanted.losses[step] - 1),
                abs(found.norms[step] / wanted.norms[step] - 1),
                max(relative),
                worst,
                ties,
            )
        )
    return rows


def table(name: str, found: Record, wanted: Record) -> str:
    """All rows of a layout as text."""
    rows = compare(found, wanted)
    head = f"{name}: largest {max(row.largest() for row in rows):.1e}, ties {sum(row.ties for row in rows)}"
    return "\n".join([head, *(str(row) for row in rows)])
