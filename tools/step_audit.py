"""Does muP survive the engine? Audits AdamW's first step on several layouts and prints a table.

    python -m tools.step_audit [LAYOUT ...]          # a layout is world.stage.tensor.expert, e.g. 2.1.2.1

For each tensor of the tiny recipe: the median of |dW + lr * decay * W| / (lr * multiplier * schedule) over the entries
with a gradient, which is 1 when rate, decay and schedule reached the optimizer as muP wants them. Exit code 1 when one
is off by more than 1e-3, or when a layout starts from other values than the first one.
"""

import argparse
import math
import sys
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests import dist
from tests.parallel import audit, harness

LAYOUTS = ("1.0.1.1", "1.1.1.1", "2.1.1.1", "2.2.1.2", "2.1.1.2", "2.1.2.1", "2.3.1.1")
"""ZeRO 0 to 3, experts over ranks, tensor ranks: what tools.parity proves on two processes."""


class Found(NamedTuple):
    """One layout's audit."""

    layout: str
    rows: list[audit.Row]
    same_start: bool


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=LAYOUTS, help="world.stage.tensor.expert")
    arguments = parser.parse_args()
    start, found = None, []
    for layout in arguments.layouts:
        world, stage, tensor, expert = map(int, layout.split("."))
        first, rows = dist.run(audit.on_ranks, world, harness.layout_of(stage, tensor, expert))[0]
        start = first if start is None else start
        found.append(Found(layout, rows, all(first[key].equal(value) for key, value in start.items())))
    console = Console()
    show(found, console)
    worst = max(abs(row.ratio - 1) for layout in found for row in layout.rows if row.entries)
    console.print(f"largest deviation from 1: {worst:.1e}")
    return int(not worst <= audit.TOLERANCE or not all(layout.same_start for layout in found))


def show(found: list[Found], console: Console) -> None:
    """A row for each tensor, a column for each layout."""
    _, registry = harness.parts_of(audit.recipe(harness.layout_of(1, 1, 1)))
    table = Table("tensor", "lr x", "decay x", *(layout.layout for layout in found), box=None)
    table.add_row("starts from the same values", "", "", *("yes" if layout.same_start else "NO" for layout in found))
    for number, (name, entry) in enumerate(registry.entries.items()):
        cells = [_cell(layout.rows[number]) for layout in found]
        table.add_row(name, f"{entry.lr_mult:g}", f"{entry.wd_mult:g}", *cells)
    console.width = max(console.width, 80 + 10 * len(found))
    console.print(table)


def _cell(row: audit.Row) -> str:
    return row.reason if math.isnan(row.ratio) else f"{row.ratio:.6f}"


if __name__ == "__main__":
    sys.exit(main())
