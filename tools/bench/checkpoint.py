"""How long a save holds the step loop, against the time to write it and to write the same bytes raw.

    python -m tools.bench.checkpoint [RECIPE] [--saves N] [--out DIR] [--save]

One process saves a recipe's model with its moments (Saver.save: copy to host memory; a thread then writes, hashes and
fsyncs while the loop could go on) under --out, by default runs/, where runs save: a temporary folder may be memory.
`held` is the time that save() takes, `written` the time from its call until the checkpoint is committed, `raw` the time
to write as many bytes to one file beside it, fsync included. The first save, which allocates the host memory, is left
out. Prints one JSON line; `ratio` is held / written (target: at most 0.10); --save keeps it in tools/bench/results/.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from launch.entry import run, setup
from tools.bench.record import tell
from tools.bench.step import DEFAULT, engine_step, synthetic


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--saves", type=int, default=5, help="measured saves")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder on the disk to measure")
    parser.add_argument("--save", action="store_true", help="keep the result in tools/bench/results/")
    arguments = parser.parse_args()
    from mmtrain.assemble import assemble
    from mmtrain.config.load import dump, load
    from mmtrain.parallel.groups import connect
    from mmtrain.run.manifest import RunState
    from mmtrain.run.saver import Saver

    dense = [f"upcycle.{part}=null" for part in ("vision", "connector", "decoder")]
    layout = ["parallel.zero_stage=1", "parallel.expert=1", "parallel.tensor=1"]
    recipe = load(arguments.recipe, [*layout, "init_from=", *dense])
    groups = connect(recipe.parallel)
    built = assemble(recipe, groups)
    engine_step(recipe, groups, built.engine, synthetic(recipe))()  # the moments exist from now on
    arguments.out.mkdir(parents=True, exist_ok=True)
    times: dict[str, list[float]] = {"held": [], "written": [], "raw": []}
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        saver = Saver(Path(folder), groups, keep_last=1)
        state = RunState(built.engine.updates, dump(recipe), {"world": 1}, built.registry.hash())
        for number in range(arguments.saves + 1):
            start = time.perf_counter()
            saver.save(number, built.engine.pieces(), state)
            held = time.perf_counter() - start
            saver.wait()
            written = time.perf_counter() - start
            size = sum(path.stat().st_size for path in (Path(folder) / f"step_{number:08d}").iterdir())
            if number:
                for name, seconds in (("held", held), ("written", written), ("raw", raw(Path(folder) / "raw", size))):
                    times[name].append(seconds)
    ratios = [held / written for held, written in zip(times["held"], times["written"], strict=True)]
    result = {
        "bench": "checkpoint",
        "recipe": arguments.recipe.name,
        "bytes": size,
        **{f"{name}_ms": round(1e3 * statistics.median(values), 1) for name, values in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "target": 0.10,
        "threads": torch.get_num_threads(),
    }
    tell(result, arguments.save)
    groups.close()
    return 0


def raw(path: Path, size: int) -> float:
    """Seconds to write `size` bytes, in pieces of 4 MiB, and have them on disk."""
    piece = memoryview(os.urandom(4 << 20))
    start = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, size, len(piece)):
            file.write(piece[: size - first])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


if __name__ == "__main__":
    run(main)
