"""The reference's own run, and how far a layout's record is from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmtrain.config.schema import Recipe
from mmtrain.config.tokens import TokenKind
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.optim.groups import hyperparameters
from mmtrain.optim.schedule import lr_factor
from tests import tiny
from tests.parallel import reference
from tests.parallel.harness import Record, parts_of, sparse, start_values
from tests.parallel.reference import Routing

TOLERANCE = 1e-5


def is_rounding(name: str) -> bool:
    """Key biases without RoPE: they shift all scores of a query alike, so their gradient is 0 but for rounding."""
    return name.startswith("vision.") and name.endswith("attention.k.bias")


def join(packs: list[tiny.Pack]) -> dict[str, torch.Tensor]:
    """Packs as one batch with valid images alone."""
    batch = {name: torch.stack([getattr(pack, name) for pack in packs]) for name in tiny.Pack._fields[:7]}
    batch["images"] = torch.cat([pack.images for pack in packs])
    batch["slots"] = torch.cat([pack.slots + number * tiny.SEQUENCE for number, pack in enumerate(packs)])
    return batch


class Reference:
    """Plain PyTorch on the tiny recipe, from the initial values; a step at a time.

    cuts  parts that a global batch is run in, one after the other: 1 but for the noise floor.
    """

    def __init__(self, recipe: Recipe, dtype: torch.dtype = torch.float64, cuts: int = 1) -> None:
        _, registry = parts_of(recipe)
        self.recipe, self.dtype, self.cuts = recipe, dtype, cuts
        self.scales = forward_scales(recipe.model, base_model_config(recipe.model, recipe.mup.base), recipe.mup)
        self.params = {name: start_values(registry, name).to(dtype) for name in registry.entries}
        self.optimizer = reference.Optimizer(
            recipe,
            {
                name: reference.Hyper(*hyperparameters(name, entry, recipe.optim), entry.part)
                for name, entry in registry.entries.items()
            },
        )
        self.load, self.bias = {}, {}
        for part, layers in sparse(recipe).items():
            moe = getattr(recipe.model, part).moe
            self.load[part] = torch.full((layers, moe.num_experts), 1 / moe.num_experts, dtype=dtype)
            self.bias[part] = torch.zeros((layers, moe.num_experts), dtype=dtype)
            if moe.balance == "bias":
                self.bias[part][:, tiny.UNUSED] = -10

    def packs(self, step: int) -> list[tiny.Pack]:
        """The global batch of a step (from 0)."""
        return tiny.packs(self.recipe.model, step, count=self.recipe.data.global_batch)

    def forwards(
        self, leaves: reference.Params, packs: list[tiny.Pack]
    ) -> Iterator[tuple[torch.Tensor, Routing, torch.Tensor]]:
        """The loss of each cut of the batch, and its positions' kinds; the losses add up to the step's."""
        shares = reference.Shares(self.load, tiny.valid_tokens(self.recipe.model, packs), self.bias)
        for first in range(self.cuts):  # every cut has an image
            batch = join(packs[first :: self.cuts])
            batch["weights"] = batch["weights"].to(self.dtype)
            weight = tiny.label_weight(packs)
            yield *reference.forward(leaves, self.recipe, self.scales, batch, shares, weight), batch["kind"]

    def gradients(self, step: int, record: Record) -> dict[str, torch.Tensor]:
        """Gradients by name at the current values; losses, counts and margin go to the record."""
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.params.items()}
        total, terms, counts, margin = 0.0, {f"source {n}": 0.0 for n in range(tiny.SOURCES)}, {}, math.inf
        squares = {"text": 0.0, "image": 0.0}
        for loss, routing, kind in self.forwards(leaves, self.packs(step)):
            loss.backward()
            at = routing.inputs.grad.square().sum(-1)
            squares = {
                name: value + float(at[kind == TokenKind[name.upper()]].sum()) for name, value in squares.items()
            }
            total += float(loss.detach())
            found = {f"source {number}": value for number, value in routing.sources.items()}
            for kind in ("balance", "z"):
                values = getattr(routing, kind)
                found |= {f"{kind} {part}": float(torch.stack(v).mean().detach()) for part, v in values.items()}
            for name, value in found.items():
                terms[name] = terms.get(name, 0.0) + value
            for part, value in routing.counts.items():
                counts[part] = counts.get(part, 0) + torch.stack(value)
            margin = min(margin, routing.margin)
        record.losses.append(total)
        record.terms.append(terms)
        record.counts.append({part: value.float() for part, value in counts.items()})
        record.margins.append(margin)
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        record.part_norms.append(
            {f"position {name}": math.sqrt(value) for name, value in squares.items()}
            | sorted_norms(grads, "expert", ".experts.")
            | sorted_norms(grads, "router", ".router.")
        )
        return grads

    def step(self, step: int, record: Record) -> None:
        """One update, and the state after it."""
        grads = self.gradients(step, record)
        factor = lr_factor(step + 1, self.recipe.optim, self.recipe.steps)
        norm, parts = self.optimizer.step(self.params, grads, factor)
        for part, counts in record.counts[-1].items():
            counts = counts.to(self.dtype)
            self.load[part] = counts / counts.sum(-1, keepdim=True)
            moe = getattr(self.recipe.model, part).moe
            if moe.balance == "bias":
                self.bias[part] += moe.bias_rate * torch.sign(counts.mean(-1, keepdim=True) - counts)
        record.norms.append(norm)
        record.part_norms[-1] |= parts
        state = {("param", name): value.clone() for name, value in self.params.items()}
        record.state.append(state | {key: value.clone() for key, value in self.optimizer.moments.items()})


def sorted_norms(grads: dict[str, torch.Tensor], name: str, mark: str) -> dict[str, float]:
    """Norm by part over the gradients whose parameters have `mark` in their name."""
    squares: dict[str, float] = {}
    for parameter, grad in grads.items():
        if mark in parameter:
            key = f"{name} {parameter.split('.')[0]}"
            squares[key] = squares.get(key, 0.0) + float(grad.square().sum())
    return {key: math.sqrt(square) for key, square in squares.items()}


def reference_run(recipe: Recipe, steps: int, dtype: torch.dtype = torch.float64, cuts: int = 1) -> Record:
    """`steps` steps of plain PyTorch."""
    plain, record = Reference(recipe, dtype, cuts), Record()
    for step in range(steps):
        plain.step(step, record)
    return record


def reference_gradients(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    """Gradients of a first step at the initial values, by name."""
    return Reference(recipe).gradients(step, Record())


def reference_logits(recipe: Recipe, step: int) -> torch.Tensor:
    """Logits [B * T, V] of a step's packs at the initial values."""
    plain = Reference(recipe)
    packs = plain.packs(step)
    shares = reference.Shares(plain.load, tiny.valid_tokens(recipe.model, packs), plain.bias)
    with torch.no_grad():
        found = reference.logits(plain.params, recipe, plain.scales, join(packs), shares, Routing())
    return found.flatten(0, 1)


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
    term: tuple[float, str]
    norm: float
    part_norm: tuple[float, str]
    worst: dict[str, tuple[float, str]]
    ties: int

    def largest(self) -> float:
        """The largest difference of this step."""
        named = (self.term, self.part_norm, *self.worst.values())
        return max(self.loss, self.norm, *(value for value, _ in named))

    def __str__(self) -> str:
        worst = "  ".join(f"{kind} {value:.1e} {name}" for kind, (value, name) in self.worst.items())
        loss = f"loss {self.loss:.1e} ({self.term[1]} {self.term[0]:.1e})"
        return f"{self.step:4d}  {loss}  norm {self.norm:.1e}  ({self.part_norm[1]} {self.part_norm[0]:.1e})  {worst}"


def worst_term(found: dict[str, float], wanted: dict[str, float], loss: float) -> tuple[float, str]:
    """The term of the loss that differs most, measured by the term, or by the whole loss where the term is small."""
    assert found.keys() == wanted.keys(), f"missing or surplus: {sorted(found.keys() ^ wanted.keys())}"
    return max((abs(found[name] - value) / max(abs(value), 0.1 * loss), name) for name, value in wanted.items())


def worst_norm(found: dict[str, float], wanted: dict[str, float]) -> tuple[float, str]:
    """The norm that differs most."""
    assert found.keys() == wanted.keys(), f"missing or surplus: {sorted(found.keys() ^ wanted.keys())}"
    return max((abs(found[name] / value - 1), name) for name, value in wanted.items())


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
        relative = worst_norm(found.part_norms[step], wanted.part_norms[step])
        rows.append(
            Row(
                step + 1,
                abs(found.losses[step] / wanted.losses[step] - 1),
                worst_term(found.terms[step], wanted.terms[step], wanted.losses[step]),
                abs(found.norms[step] / wanted.norms[step] - 1),
                relative,
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
