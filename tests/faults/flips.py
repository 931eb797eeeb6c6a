"""Single flipped bits: each is found by tools.inspect_checkpoint, and a resume takes the checkpoint before.

    python -m tests.faults.flips [--count 1000] [--resumes 50] [--seed 0]

A quarter of the bits each in the manifest, in safetensors headers, in tensors and in the other files, drawn by seed
over the bytes of a file. Every inspection runs the command's own main in this process, with os._exit and stderr
caught (the tests run it in processes of its own): its exit code must be 2 and its one line must name the file. Every
resume is the training of a copied run folder. Prints a line a place; exit code 1 when any flip was missed.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import launch.entry
import tools.inspect_checkpoint
from mmtrain.config.schema import Recipe
from mmtrain.run.retain import committed
from tests.data.inputs import tokenizer
from tests.faults import job
from tests.faults.compare import difference
from tests.train import jobs, tasks, tiny

PLACES = ("manifest", "header", "tensors", "other files")
EXIT_DAMAGED = 2


class Flip(NamedTuple):
    """One bit of one file."""

    place: str
    file: str
    byte: int
    bit: int


def draw(folder: Path, place: str, random: random.Random) -> Flip:
    """A bit of `place` in the checkpoint `folder`, uniform over the bytes of one of its files."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    files = {
        "manifest": ["manifest.json"],
        "header": shards,
        "tensors": shards,
        "other files": sorted({path.name for path in folder.iterdir()} - {*shards, "manifest.json"}),
    }
    file = random.choice(files[place])
    size = (folder / file).stat().st_size
    start = 0
    if file in shards:
        with (folder / file).open("rb") as opened:
            header = 8 + struct.unpack("<Q", opened.read(8))[0]
        start, size = (0, header) if place == "header" else (header, size)
    return Flip(place, file, random.randrange(start, size), random.randrange(8))


def flip(folder: Path, what: Flip) -> None:
    """Turn the bit; a second time turns it back."""
    with (folder / what.file).open("r+b") as file:
        file.seek(what.byte)
        (value,) = file.read(1)
        file.seek(what.byte)
        file.write(bytes([value ^ 1 << what.bit]))


def inspect(*paths: str) -> None:
    """`python -m tools.inspect_checkpoint PATHS` in a process of its own."""
    sys.argv = ["tools/inspect_checkpoint.py", *paths]
    launch.entry.run(tools.inspect_checkpoint.main)


def in_a_process(folder: Path, logs: Path) -> tuple[int, str]:
    """Exit code of the tool, and what it printed."""
    ended = jobs.run(logs, inspect, str(folder))
    return ended.code, ended.log


def here(folder: Path, _: Path) -> tuple[int, str]:
    """The same without a process."""
    told = io.StringIO()

    def leave(code: int) -> None:
        raise SystemExit(code)

    with mock.patch.object(os, "_exit", leave), contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            inspect(str(folder))
        except SystemExit as end:
            return int(end.code or 0), told.getvalue()
    raise AssertionError("launch.entry.run always exits")


def missed(folder: Path, what: Flip, logs: Path, run: Callable[[Path, Path], tuple[int, str]] = in_a_process) -> str:
    """What the tool said about a flip that it did not report as it should; empty otherwise."""
    flip(folder, what)
    code, told = run(folder, logs)
    flip(folder, what)
    lines = told.splitlines()
    good = code == EXIT_DAMAGED and len(lines) == 1 and lines[0].startswith("error: ") and what.file in lines[0]
    return "" if good else f"{what}: exit code {code}, {told!r}"


def origin(shards: Path, folder: Path) -> Recipe:
    """A finished run of one rank with checkpoints of its last steps."""
    recipe = job.recipe(shards, folder / "run", tokenizer())
    alone = replace(recipe.parallel, expert=1)
    recipe = replace(recipe, parallel=alone, steps=4, checkpoint=replace(recipe.checkpoint, every=1))
    ended = jobs.run(folder / "log", tasks.trained, recipe)
    assert ended.value == 0, ended.log
    return recipe


def passed_over(recipe: Recipe, place: str, random: random.Random, folder: Path) -> str:
    """Flip a bit in the newest checkpoint and start the run again; what went wrong, or nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recipe.out, folder / "run")
    again = replace(recipe, out=str(folder / "run"))
    newest = list(committed(folder / "run").values())[-1]
    what = draw(newest, place, random)
    flip(newest, what)
    ended = jobs.run(folder / "log", tasks.trained, again)
    if ended.value != 0 or "CHECKPOINT PASSED OVER" not in ended.log or "going on after step 3" not in ended.log:
        return f"{what}: {ended.log}"
    gap = difference(again, recipe)
    return f"{what}: {gap}" if gap else ""


def campaign(count: int, resumes: int, seed: int, folder: Path) -> Iterator[tuple[str, str, int, list[str]]]:
    """(what, place, how many, those that went wrong) of every place."""
    tiny.write_shards(folder / "shards", tokenizer())
    recipe = origin(folder / "shards", folder)
    newest = list(committed(Path(recipe.out)).values())[-1]
    draws = random.Random(seed)
    for number, place in enumerate(PLACES):
        share = len(range(number, count, len(PLACES)))
        wrong = [missed(newest, draw(newest, place, draws), folder, here) for _ in range(share)]
        yield "inspected", place, share, list(filter(None, wrong))
    for number, place in enumerate(PLACES):
        share = len(range(number, resumes, len(PLACES)))
        wrong = [passed_over(recipe, place, draws, folder / "again") for _ in range(share)]
        yield "resumed", place, share, list(filter(None, wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="flips to inspect")
    parser.add_argument("--resumes", type=int, default=50, help="flips to resume over")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for what, place, share, wrong in campaign(arguments.count, arguments.resumes, arguments.seed, Path(folder)):
            print(f"{what:>9} {place:>12}: {share - len(wrong)} of {share} found", *wrong, sep="\n  ", flush=True)
            bad += len(wrong)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
