"""PNG plots of a run, drawn from metrics.jsonl alone, so that they can be drawn again at any time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtrain.config.schema import PARTS
from mmtrain.run.metrics import each_record

RARE = 0.02
"""Share of choices under which an expert counts as hardly used."""

_DPI = 110
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#9c6b4e", "#97bbf5")
_INK, _GRID = "#222222", "#dddddd"

Record = Mapping[str, Any]


def draw_plots(metrics: Path, folder: Path, name: str) -> list[Path]:
    """Draw loss, lr, grad_norm, grad_ratio, held_out and experts .png, where there are numbers; return paths.

    metrics   metrics.jsonl
    folder    where the PNGs go
    name      the run's name, for the titles
    """
    records: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for record in each_record(metrics):
        if record.get("expert_shares"):
            last.pop("expert_shares", None)  # most of a line, and only the last ones are drawn
            last = record
        records.append(record)
    if not records:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Sequence[Record], str], Figure | None]] = {
        "loss.png": _loss,
        "lr.png": _lr,
        "grad_norm.png": _grad_norm,
        "grad_ratio.png": _grad_ratio,
        "held_out.png": _held_out,
        "experts.png": _experts,
    }
    paths = []
    for file, draw in plots.items():
        if figure := draw(records, name):
            figure.savefig(folder / file, dpi=_DPI)
            plt.close(figure)
            paths.append(folder / file)
    return paths


def _axes(title: str, y: str) -> tuple[Figure, Axes]:
    """One empty plot over steps, 880 x 495 pixels."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_title(title, loc="left", color=_INK, fontsize=12)
    axes.set_xlabel("step")
    axes.set_ylabel(y)
    _plain(axes)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _plain(axes: Axes) -> None:
    """No box around the plot."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#888888")
    axes.tick_params(colors="#444444", labelsize=9)


def _series(records: Sequence[Record], read: Callable[[Record], float | None]) -> tuple[list[int], list[float]]:
    """Steps and values where there is one."""
    points = [(record["step"], value) for record in records if (value := read(record)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _names(records: Sequence[Record], key: str) -> list[str]:
    """Names that occur in the maps of a key, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record.get(key) or {}))


def _line(axes: Axes, steps: list[int], values: list[float], label: str, colour: str, width: float = 1.4) -> None:
    """A curve, with dots while the points are few."""
    axes.plot(steps, values, label=label, color=colour, linewidth=width, marker="o" if len(steps) <= 30 else "", ms=3)


def _legend(axes: Axes, labels: int) -> None:
    """A legend beside the plot, where there is more than one curve."""
    if labels > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, borderaxespad=0)


def _loss(records: Sequence[Record], name: str) -> Figure:
    figure, axes = _axes(f"{name}: training loss by source", "cross-entropy (nats per token)")
    sources = _names(records, "loss_by_source")
    for source, colour in zip(sources, _cycle(len(sources)), strict=True):
        steps, values = _series(records, lambda record, s=source: record["loss_by_source"].get(s))
        _line(axes, steps, values, source, colour, 1.2)
    steps, values = _series(records, lambda record: record["language_loss"])
    _line(axes, steps, values, "all", _INK, 2.0)
    if marks := [record["step"] for record in records if record.get("skipped")]:
        axes.plot(
            marks, [0.02] * len(marks), "x", color="#c00000", transform=axes.get_xaxis_transform(), label="skipped"
        )
    axes.set_ylim(bottom=0)
    _legend(axes, len(sources) + 1)
    return figure


def _cycle(count: int) -> list[str]:
    """`count` colours."""
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _lr(records: Sequence[Record], name: str) -> Figure:
    figure, axes = _axes(f"{name}: learning rate", "base learning rate x schedule")
    _line(axes, *_series(records, lambda record: record["lr"]), "lr", _COLOURS[0], 1.8)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylim(bottom=0)
    return figure


def _grad_norm(records: Sequence[Record], name: str) -> Figure:
    figure, axes = _axes(f"{name}: gradient norm by part, before clipping", "L2 norm (log scale)")
    parts = _names(records, "part_norms")
    for part, colour in zip(parts, _cycle(len(parts)), strict=True):
        _line(axes, *_positive(_series(records, lambda record, p=part: record["part_norms"].get(p))), part, colour, 1.2)
    _line(axes, *_positive(_series(records, lambda record: record["grad_norm"])), "all", _INK, 2.0)
    axes.set_yscale("log")
    _legend(axes, len(parts) + 1)
    return figure


RATIOS = (
    ("position_norms", "image", "text", "image / text positions"),
    ("part_norms", "vision", "decoder", "vision / decoder"),
    ("part_norms", "connector", "decoder", "connector / decoder"),
)
"""Key of a record, two of its names, and the label of their ratio."""


def _grad_ratio(records: Sequence[Record], name: str) -> Figure | None:
    curves = []
    for key, above, below, label in RATIOS:
        steps, values = _positive(_series(records, lambda record, names=(key, above, below): _ratio(record, *names)))
        if steps:
            curves.append((steps, values, label))
    if not curves:
        return None
    figure, axes = _axes(f"{name}: gradient norms against each other", "ratio of L2 norms (log scale)")
    for (steps, values, label), colour in zip(curves, _cycle(len(curves)), strict=True):
        _line(axes, steps, values, label, colour)
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yscale("log")
    _legend(axes, max(2, len(curves)))
    return figure


def _ratio(record: Record, key: str, above: str, below: str) -> float | None:
    """One norm of a record over another; None where one is missing or the lower one is 0."""
    norms = record.get(key) or {}
    if norms.get(above) is None or not norms.get(below):
        return None
    return norms[above] / norms[below]


def _positive(series: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    """Points that a log scale can show: a frozen part's norm is 0."""
    points = [(step, value) for step, value in zip(*series, strict=True) if value > 0]
    return [step for step, _ in points], [value for _, value in points]


def _held_out(records: Sequence[Record], name: str) -> Figure | None:
    sources = _names(records, "held_out")
    if not sources:
        return None
    figure, axes = _axes(f"{name}: held-out loss by source", "cross-entropy (nats per token)")
    named = [source for source in sources if source != "all"]
    for source, colour in zip(named, _cycle(len(named)), strict=True):
        _line(axes, *_series(records, lambda record, s=source: record["held_out"].get(s)), source, colour, 1.2)
    if "all" in sources:
        _line(axes, *_series(records, lambda record: record["held_out"].get("all")), "all", _INK, 2.0)
    axes.set_ylim(bottom=0)
    _legend(axes, len(sources))
    return figure


def _experts(records: Sequence[Record], name: str) -> Figure | None:
    """A panel a part: rows are layers, columns experts, colour the load against an even one, last logged step."""
    last = next((record for record in reversed(records) if record.get("expert_shares")), None)
    if last is None:
        return None
    shares = {part: last["expert_shares"][part] for part in PARTS if last["expert_shares"].get(part)}
    widths = [max(len(next(iter(layers.values()))), 4) for layers in shares.values()]
    rows = max(len(layers) for layers in shares.values())
    size = (min(2.6 + 0.55 * sum(widths), 16), min(2.2 + 0.36 * rows, 12))
    figure, panels = plt.subplots(
        1, len(shares), figsize=size, layout="constrained", squeeze=False, gridspec_kw={"width_ratios": widths}
    )
    for axes, (part, layers) in zip(panels[0], shares.items(), strict=True):
        experts = len(next(iter(layers.values())))
        image = axes.imshow(
            [[s * experts for s in row] for row in layers.values()], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto"
        )
        axes.set_title(f"{part}: experts", fontsize=10, color=_INK)
        axes.set_yticks(range(len(layers)), list(layers))
        axes.set_ylim(rows - 0.5, -0.5)  # cells of one height in all panels
        axes.set_xticks(range(0, experts, max(1, experts // 16)))
        axes.tick_params(colors="#444444", labelsize=8, length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        if experts * len(layers) <= 256:
            _write_shares(axes, layers, experts)
    panels[0][0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels[0].tolist(), ticks=[0, 1, 2], pad=0.02, fraction=0.05)
    bar.ax.set_yticklabels(["0", "even", "2x or more"], fontsize=8)
    bar.outline.set_visible(False)
    figure.suptitle(
        f"{name}: expert load at step {last['step']} (% of choices; under {RARE:.0%} in bold)",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    return figure


def _write_shares(axes: Axes, layers: Mapping[str, list[float]], experts: int) -> None:
    """Percentages in the cells."""
    for row, values in enumerate(layers.values()):
        for column, share in enumerate(values):
            digits = 1 if share < 0.1 else 0
            dark = abs(share * experts - 1) > 0.65
            weight = "bold" if share < RARE else "normal"
            colour = "white" if dark else _INK
            axes.text(
                column,
                row,
                f"{100 * share:.{digits}f}",
                ha="center",
                va="center",
                fontsize=8,
                color=colour,
                weight=weight,
            )
