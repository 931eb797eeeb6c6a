"""The coordinate check: does a parametrisation leave the size of what training changes alone when width grows?

A model is trained for a few steps at several widths. Each probe keeps an activation h on a fixed batch before (h_0) and
after (h_t) them; the size of the change is RMS(h_t - h_0). Under muP it does not depend on width (Tensor Programs V,
arXiv:2203.03466, appendix D.1), so log2 of it against log2 width has slope 0. Attention, router and output logits may
shrink, because at the start their summands are independent. Growth is the dangerous direction.

A probe passes when its slope is proven to lie within the limits: the whole of slope +- 2 standard errors does. A few
units hold much noise (a squeeze layer of a small base has 16), so a proof may take more than the least number of seeds.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIGHEST = 0.10
"""What slope + 2 standard errors may be."""
LOWEST = -0.25
"""What slope - 2 standard errors may be."""
LOWEST_LOGITS = -0.60
"""The same for attention, router and output logits."""

MIN_WIDTHS, MIN_SPAN, MIN_SEEDS, MIN_STEPS = 4, 8.0, 3, 8

LOGITS = ("attention logits", "router logits", "logits")

NAMED = (
    ("embedding", r"(vision\.patch|decoder\.embedding)"),
    ("keys", r".*attention\.k"),
    ("values", r".*attention\.v"),
    ("attention", r".*attention\.out"),
    ("router logits", r".*\.router"),
    ("mlp", r".*\.mlp"),
    ("block", r"(vision|decoder)\.blocks\.\d+"),
    ("squeeze", r".*\.(squeeze|excite)"),
    ("conv", r".*\.(depthwise|enter|leave)"),
    ("stage", r"connector\.stage\d\.\d+"),
    ("pool", r"connector\.final_norm"),
    ("features", r"vision"),
    ("hidden", r"decoder\.norm"),
)
"""Kind of probe -> the modules whose output it is, by canonical name."""

Activations = dict[str, Tensor]
"""Probe ("KIND NAME") -> activation."""


class Recording(NamedTuple):
    """What a forward showed."""

    activations: Activations
    scales: dict[str, float]
    """Attention module -> the factor on q.k that it used."""


class Fit(NamedTuple):
    """A line through log2 size against log2 width."""

    slope: float
    error: float
    """Standard error of the slope."""
    r2: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """One probe's."""

    probe: str
    part: str
    kind: str
    fit: Fit
    lowest: float
    problem: str
    """Empty when it passes."""

    @property
    def outside(self) -> bool:
        """Whether all of slope +- 2 standard errors lies beyond a limit, or there is no slope: no noise explains it."""
        slope, error = self.fit.slope, self.fit.error
        return math.isnan(slope) or slope - 2 * error > HIGHEST or slope + 2 * error < self.lowest


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """Keep the activations of every forward inside; the last forward of a module counts.

    Attention logits are taken where they are made: q.k times the scale that the forward really uses, at the positions
    that the mask lets through. A module that returns several things is kept by its first.
    """
    kept = Recording({}, {})
    attentions = [name for name, _ in model.named_modules() if name.endswith(".attention")]
    with _hooks(model, kept.activations), _attention(kept, attentions):
        yield kept


def change(before: Activations, after: Activations) -> dict[str, float]:
    """RMS(after - before) of every probe, in fp64."""
    return {
        probe: float((after[probe].double() - value.double()).square().mean().sqrt()) for probe, value in before.items()
    }


def fit(sizes: Mapping[float, Sequence[float]]) -> Fit:
    """Least squares of log2 size over log2 width: one slope, and an intercept for each seed, which draws its own batch.

    sizes: width -> size by seed, the same seeds at every width. ValueError where a size is not above 0.
    """
    if not all(size > 0 and math.isfinite(size) for by_seed in sizes.values() for size in by_seed):
        raise ValueError("a logarithm needs numbers above 0")
    x = torch.tensor([math.log2(width) for width in sizes], dtype=torch.float64).unsqueeze(1)
    y = torch.tensor([list(by_seed) for by_seed in sizes.values()], dtype=torch.float64).log2()  # [widths, seeds]
    dx, dy = (x - x.mean()).expand_as(y), y - y.mean(0)
    spread = float(dx.square().sum())
    slope = float((dx * dy).sum()) / spread
    rest, total = float((dy - slope * dx).square().sum()), float(dy.square().sum())
    free = y.numel() - y.shape[1] - 1
    error = math.sqrt(rest / free / spread) if free > 0 else math.nan
    return Fit(slope, error, 1.0 - rest / total if total else 1.0, y.numel())


def judge(sizes: Mapping[str, Mapping[float, Sequence[float]]]) -> list[Verdict]:
    """The verdict on each probe from probe -> width -> size of the change by seed."""
    return [_judge(probe, by_width) for probe, by_width in sizes.items()]


def lacking(widths: Sequence[float], seeds: int, steps: int, parameters: Sequence[int]) -> list[str]:
    """Why a check would prove nothing, whatever its slopes."""
    found = []
    if len(set(widths)) < MIN_WIDTHS or max(widths) / min(widths) < MIN_SPAN:
        found.append(f"widths {sorted(widths)}: at least {MIN_WIDTHS} of them over a factor of {MIN_SPAN:g} are needed")
    if seeds < MIN_SEEDS:
        found.append(f"{seeds} seeds: at least {MIN_SEEDS} are needed for a standard error")
    if steps < MIN_STEPS:
        found.append(f"{steps} steps: at least {MIN_STEPS} are needed, a wrong rate shows late")
    if len(set(parameters)) < len(parameters):
        found.append(f"parameters by width {list(parameters)}: some widths give the same model")
    return found


def _judge(probe: str, by_width: Mapping[float, Sequence[float]]) -> Verdict:
    kind, _, name = probe.rpartition(" ")
    lowest = LOWEST_LOGITS if kind in LOGITS else LOWEST
    points = [(width, size) for width, sizes in by_width.items() for size in sizes]
    try:
        line = fit(by_width)
    except ValueError:
        line = Fit(math.nan, math.nan, math.nan, len(points))
        bad = [f"{size:g} at width {width:g}" for width, size in points if not (size > 0 and math.isfinite(size))]
        problem = f"changed by {bad[0]}: nothing learns there, or training diverged"
        return Verdict(probe, name.partition(".")[0], kind, line, lowest, problem)
    problem = ""
    if line.slope + 2 * line.error > HIGHEST:
        problem = f"grows: slope {line.slope:+.2f} + 2 x {line.error:.2f} is above {HIGHEST:+.2f}"
    elif line.slope - 2 * line.error < lowest:
        problem = f"shrinks: slope {line.slope:+.2f} - 2 x {line.error:.2f} is below {lowest:+.2f}"
    return Verdict(probe, name.partition(".")[0], kind, line, lowest, problem)


@contextmanager
def _hooks(model: nn.Module, kept: Activations) -> Iterator[None]:
    handles = []
    for name, module in model.named_modules():
        for kind, pattern in NAMED:
            if re.fullmatch(pattern, name):
                handles.append(module.register_forward_hook(_keeper(kept, f"{kind} {name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(kept: Activations, probe: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(_: nn.Module, __: Any, output: Any) -> None:
        kept[probe] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    return keep


@contextmanager
def _attention(kept: Recording, names: Sequence[str]) -> Iterator[None]:
    """Stand between the model and PyTorch's attention, which is called once a layer, in the order of the modules."""
    real = F.scaled_dot_product_attention
    called = 0

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        nonlocal called
        name = names[called % len(names)]
        called += 1
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q @ keys.transpose(-1, -2)).detach() * options["scale"]
        seen = torch.ones_like(logits, dtype=torch.bool) if attn_mask is None else (attn_mask == 0).expand_as(logits)
        kept.activations[f"attention logits {name}"] = logits[seen]
        kept.scales[name] = options["scale"]
        return real(q, k, v, attn_mask=attn_mask, **options)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real
