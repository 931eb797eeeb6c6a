"""What a checkpoint holds, whether it is whole, and what differs between two.

    python -m tools.inspect_checkpoint CHECKPOINT [--tensors]      every file is hashed and compared with the manifest
    python -m tools.inspect_checkpoint CHECKPOINT OTHER            both, and then every tensor of one with the other's

CHECKPOINT is a step folder, or a run folder: its newest checkpoint, good or not. Layouts may differ: tensors are
compared as wholes, one at a time. Exit code 0: whole (and the same); 1: two that differ; 2: damaged, or no checkpoint
(one line on stderr names the files).
"""

import argparse
import difflib
import math
from collections import Counter
from pathlib import Path

import torch

from launch.entry import run, setup
from mmtrain.run.reader import Reader, open_checkpoint
from mmtrain.run.retain import committed

EXIT_DIFFER = 1
COMPARED = ("optimizer_steps", "registry_hash", "cursor", "routers", "guard")
"""Fields of the state that must agree; recipe, mesh and measured numbers are shown and may differ."""


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    arguments = parser.parse_args()
    reader = open_checkpoint(_step_folder(arguments.checkpoint))
    describe(reader, arguments.tensors)
    if arguments.other is None:
        return 0
    other = open_checkpoint(_step_folder(arguments.other))
    describe(other, arguments.tensors)
    return EXIT_DIFFER if differences(reader, other) else 0


def _step_folder(path: Path) -> Path:
    """The newest step of a run folder; any other path as it is."""
    return list(committed(path).values())[-1] if committed(path) else path


def describe(reader: Reader, tensors: bool) -> None:
    """Print what a verified checkpoint is."""
    contents, state = reader.manifest, reader.manifest.state
    size = sum(record.size for record in contents.files.values())
    print(f"{reader.folder}: whole; {len(contents.files)} files, {size:,} bytes, sha256 of each as written")
    print(f"  step {contents.step}, {state.optimizer_steps} updates, registry {state.registry_hash[:12]}")
    layout = ", ".join(f"{key} {value}" for key, value in state.mesh.items())
    print(f"  written by {layout}, at commit {contents.commit or 'unknown'}")
    kinds = Counter(kind for kind in ("param", "exp_avg", "exp_avg_sq") for _ in reader.names(kind))
    values = sum(math.prod(shape) for shape in reader.shapes().values())
    print(f"  {values:,} parameters in {kinds['param']} tensors; moments of {kinds['exp_avg']}")
    for name, value in sorted(state.metrics.items()):
        print(f"  {name} {value:g}")
    if tensors:
        for name, shape in reader.shapes().items():
            print(f"  {name} {list(shape)}")


def differences(one: Reader, two: Reader) -> int:
    """Print what differs, and return how many things do."""
    found = 0
    if one.manifest.step != two.manifest.step:
        print(f"step: {one.manifest.step} and {two.manifest.step}")
        found += 1
    for field in COMPARED:
        if getattr(one.manifest.state, field) != getattr(two.manifest.state, field):
            print(f"{field}: differs")
            found += 1
    texts = (reader.manifest.state.recipe.splitlines() for reader in (one, two))
    for line in difflib.unified_diff(*texts, "recipe", "recipe of the other", lineterm="", n=0):
        print(f"  {line}")
    equal = 0
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        here, there = one.names(kind), two.names(kind)
        for name in sorted({*here, *there}):
            told = _tensor(one, two, kind, name, name in here, name in there)
            if told:
                print(f"{kind} {name}: {told}")
            found, equal = found + bool(told), equal + (not told)
    print(f"{found} differences; {equal} tensors are equal to the bit")
    return found


def _tensor(one: Reader, two: Reader, kind: str, name: str, here: bool, there: bool) -> str:
    """How a tensor differs; empty when it does not. The distance is ||a - b|| / ||b||."""
    if not (here and there):
        return f"only in {(one if here else two).folder}"
    if one.shape(name) != two.shape(name):
        return f"shape {list(one.shape(name))} and {list(two.shape(name))}"
    a, b = one.read(name, kind), two.read(name, kind)
    if a.dtype == b.dtype and torch.equal(a, b):
        return ""
    gap = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)
    return f"relative difference {float(gap):.1e}"


if __name__ == "__main__":
    run(main)
