"""Trains the tiny recipe on several layouts and prints how far each is from plain PyTorch in one process.

Run it on a new cluster or after an upgrade: `python -m tools.parity [LAYOUT ...]`; a layout is
world.stage.tensor.expert, e.g. 2.1.2.1 for ZeRO-1 on 2 tensor ranks. Exit code 1 when a difference exceeds 1e-5.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests import dist, tiny
from tests.parallel import compare, harness

FIVE = ("1.1.1.1", "2.1.1.1", "2.2.1.2", "2.1.2.1", "2.3.1.1")
"""One process; ZeRO-1; ZeRO-2 with experts over 2 ranks; ZeRO-1 with 2 tensor ranks; ZeRO-3."""


def main() -> int:
    """Print one table a layout and optimizer; the number of layouts beyond the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=FIVE, help="world.stage.tensor.expert")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"], choices=["adamw", "sgd"])
    arguments = parser.parse_args()
    wanted = {name: compare.reference_run(tiny.recipe(name), arguments.steps) for name in arguments.optimizers}
    print(f"smallest routing margin of the reference: {min(min(run.margins) for run in wanted.values()):.1e}")
    beyond = 0
    for layout in arguments.layouts:
        world, stage, tensor, expert = map(int, layout.split("."))
        with tempfile.TemporaryDirectory() as folder:
            parallel = harness.layout_of(stage, tensor, expert)
            dist.run(harness.run_layout, world, folder, arguments.optimizers, parallel, arguments.steps)
            for name in arguments.optimizers:
                found = harness.load_record(Path(folder), name)
                print(
                    compare.table(
                        f"{world} ranks, ZeRO-{stage} x TP {tensor} x EP {expert}, {name}", found, wanted[name]
                    )
                )
                largest = max(row.largest() for row in compare.compare(found, wanted[name]))
                beyond += not largest <= compare.TOLERANCE
    return int(beyond > 0)


if __name__ == "__main__":
    sys.exit(main())
