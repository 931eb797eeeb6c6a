"""Does muP survive the engine? Audits AdamW's first step on several layouts and prints two tables.

    python -m tools.step_audit [LAYOUT ...]          # a layout is world.stage.tensor.expert, e.g. 2.1.2.1
    python -m tools.step_audit --save                # all layouts below, kept in tools/bench/results/step_audit.json

For each tensor of the tiny recipe: the median of |dW + lr * decay * W| / (lr * multiplier * schedule) over the entries
with a gradient, which is 1 when rate, decay and schedule reached the optimizer as muP wants them. Exit code 1 when one
is off by more than 1e-3, or when a layout starts from other values than the first one.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mmtrain.config.schema import Parallel
from tests import dist
from tests.parallel import audit, harness
from tools.bench import record

LAYOUTS = tuple(
    f"{world}.{stage}.{tensor}.{expert}"
    for stage in range(4)
    for world, tensor, expert in ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2))
    if not (stage == 0 and expert > 1)
)
"""ZeRO 0 to 3 on one process, two data ranks, two tensor ranks, two expert ranks, and two by two of both; a recipe
refuses ZeRO-0 with experts over ranks."""


class Found(NamedTuple):
    """One layout's audit."""

    layout: str
    rows: list[audit.Row]
    same_start: bool

    def ratios(self) -> list[float]:
        """Of the tensors that have one."""
        return [row.ratio for row in self.rows if row.entries]


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=LAYOUTS, help="world.stage.tensor.expert")
    parser.add_argument("--save", action="store_true", help="keep the result with hardware, commit and command")
    arguments = parser.parse_args()
    found = audits(arguments.layouts)
    console = Console()
    show(found, console)
    result = as_json(found)
    record.tell(result, arguments.save)
    return int(not result["largest_deviation"] <= audit.TOLERANCE or not all(layout.same_start for layout in found))


def audits(layouts: Iterable[str]) -> list[Found]:
    """Each layout's audit, on fresh ranks of its own."""
    start, found = None, []
    for layout in layouts:
        world, stage, tensor, expert = map(int, layout.split("."))
        parallel = Parallel(zero_stage=stage, tensor=tensor, expert=expert)
        first, rows = dist.run(audit.on_ranks, world, parallel)[0]
        start = first if start is None else start
        found.append(Found(layout, rows, all(first[key].equal(value) for key, value in start.items())))
    return found


def show(found: list[Found], console: Console) -> None:
    """A row for each tensor over all layouts, then a row for each layout over all tensors."""
    tensors = Table("tensor", "lr x", "decay x", "smallest", "largest", "left out", box=None)
    for name, entry in _entries().items():
        rows = [next(row for row in layout.rows if row.name == name) for layout in found]
        ratios, reasons = [row.ratio for row in rows if row.entries], {row.reason for row in rows if row.reason}
        tensors.add_row(name, f"{entry.lr_mult:g}", f"{entry.wd_mult:g}", *_ends(ratios), ", ".join(reasons))
    layouts = Table("layout", "same start", "tensors", "smallest", "largest", box=None)
    for layout in found:
        ratios = layout.ratios()
        layouts.add_row(layout.layout, "yes" if layout.same_start else "NO", str(len(ratios)), *_ends(ratios))
    console.width = max(console.width, 120)
    console.print(tensors)
    console.print(layouts)


def _ends(ratios: list[float]) -> tuple[str, str]:
    return (f"{min(ratios):.6f}", f"{max(ratios):.6f}") if ratios else ("", "")


def as_json(found: list[Found]) -> dict[str, Any]:
    """Both tables as plain values."""
    return {
        "bench": "step_audit",
        "largest_deviation": max(abs(ratio - 1) for layout in found for ratio in layout.ratios()),
        "target": audit.TOLERANCE,
        "layouts": {
            layout.layout: {
                "same_start": layout.same_start,
                "tensors": len(layout.ratios()),
                "left_out": {row.name: row.reason for row in layout.rows if row.reason},
                **_range(layout.ratios()),
            }
            for layout in found
        },
        "tensors": {
            name: {
                "lr_multiplier": entry.lr_mult,
                "decay_multiplier": entry.wd_mult,
                **_range([row.ratio for layout in found for row in layout.rows if row.name == name and row.entries]),
            }
            for name, entry in _entries().items()
        },
    }


def _range(ratios: list[float]) -> dict[str, float]:
    return {"smallest": round(min(ratios), 7), "largest": round(max(ratios), 7)} if ratios else {}


def _entries() -> dict[str, Any]:
    """The tiny recipe's table of muP."""
    return harness.parts_of(audit.recipe(Parallel()))[1].entries


if __name__ == "__main__":
    sys.exit(main())
