"""From starting the loader to its first decoded batch, at step 0 and at step 100,000 of ten million samples.

    python -m tools.bench.resume [--rounds 5] [--dir DIR] [--save]

Three real shards of a thousand samples each (captions, illustrated documents, texts; photographs of 320 x 240) are
linked under 10,000 names, so every index and tar is opened, read and checked as a run would. Each start is a process of
its own with one worker; starts take turns. `loader` is from the constructor to the first optimizer step of 8 packs of
2,048 tokens, decoded; `planned` is a second, warm way to the first plan; `imports` is Python's way there. Wall seconds,
median and best.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from mmtrain.config.schema import Connector, Data, Model, Recipe, Source, Vision
from mmtrain.data.index import build_index, write_index
from mmtrain.data.loader import Loader, make_planner
from mmtrain.data.shards import ShardWriter
from mmtrain.data.tokenizer import Tokenizer, train_bpe
from tools.bench.loader import photograph
from tools.bench.planner import later
from tools.bench.record import ROOT, tell

SHARDS = {"captions": 7000, "interleaved": 2000, "text": 1000}
WEIGHTS = {"captions": 45.0, "interleaved": 45.0, "text": 10.0}
PER_SHARD = 1000
STEP = 100_000
WORDS = ("a", "picture", "of", "nothing", "in", "particular", "with", "some", "words", "under", "it")


def build(folder: Path) -> None:
    """One shard of each source, and its other names."""
    rng = np.random.default_rng(0)
    photos = [jpeg(photograph(number, 240, 320)) for number in range(16)]
    tokenizer = Tokenizer(train_bpe([" ".join(WORDS)], 400, folder / "tokenizer.json"))
    for source, count in SHARDS.items():
        place = folder / source
        place.mkdir()
        writer = ShardWriter(place, PER_SHARD)
        for number in range(PER_SHARD):
            writer.write(f"{number:06d}", sample(source, rng, photos))
        writer.close()
        (tar,) = place.glob("*.tar")
        index = write_index(build_index(tar, tokenizer)[0])
        for number in range(1, count):
            for file in (tar, index):
                os.link(file, place / f"shard-{number:06d}{file.suffix}")


def jpeg(image: Image.Image) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def sample(source: str, rng: np.random.Generator, photos: Sequence[bytes]) -> dict[str, bytes]:
    """One document's files."""

    def text(mean: float) -> str:
        return " ".join(rng.choice(WORDS, int(rng.lognormal(mean, 0.8)) + 4))

    if source == "text":
        fields: dict[str, Any] = {"kind": "text", "texts": [text(6.0)], "images": [None]}
    elif source == "captions":
        fields = {"kind": "caption", "texts": [None, text(2.8)], "images": ["0.jpg", None]}
    else:
        pairs = range(int(rng.integers(1, 8)))
        fields = {
            "kind": "interleaved",
            "texts": [part for _ in pairs for part in (text(3.5), None)],
            "images": [part for number in pairs for part in (None, f"{number}.jpg")],
        }
    names = filter(None, fields["images"])
    return {"json": json.dumps(fields).encode()} | {name: photos[int(rng.integers(len(photos)))] for name in names}


def recipe_of(folder: Path) -> Recipe:
    """A recipe that reads the folder."""
    model = replace(
        Model(), vision=replace(Vision(), image_size=(224, 224)), connector=replace(Connector(), num_tokens=64)
    )
    sources = {name: Source(str(folder / name), weight) for name, weight in WEIGHTS.items()}
    data = Data(sources=sources, tokenizer=str(folder / "tokenizer.json"), max_images=32, global_batch=8)
    return replace(Recipe(name="bench", out=""), model=model, data=data, steps=1 << 40)


def cursor_at(folder: Path, step: int) -> dict[str, Any]:
    """The place in the stream after so many steps: real windows, counters moved."""
    recipe = recipe_of(folder)
    planner, quarantine = make_planner(recipe, Tokenizer(recipe.data.tokenizer), recipe.data.sources)
    for _ in range(100):
        planner.next_step()
    samples = {name: count * PER_SHARD for name, count in SHARDS.items()}
    packs = step * recipe.data.global_batch - planner.packs
    return later(planner.cursor(), packs, samples) | {"quarantine": quarantine}


def start(folder: Path, cursor: dict[str, Any] | None, began: float) -> dict[str, float]:
    """One start in this process, in seconds."""
    recipe = recipe_of(folder)
    tokenizer = Tokenizer(recipe.data.tokenizer)
    ready = time.time()
    with Loader(recipe, tokenizer, 0, 1, cursor=cursor) as loader:
        stream = iter(loader)
        step = next(stream)
        first = time.time() - ready
    assert sum(int(batch.image_valid.sum()) for batch in step.micro_batches) > 0
    ready_again = time.time()
    planner, _ = make_planner(recipe, tokenizer, recipe.data.sources)
    if cursor is not None:
        planner.restore(cursor)
    planner.next_step()
    return {"imports": ready - began, "planned": time.time() - ready_again, "loader": first}


def started(folder: Path, cursor: Path | None) -> dict[str, float]:
    """One start in a process of its own."""
    words = [sys.executable, "-m", "tools.bench.resume", "--start", str(folder), str(time.time()), str(cursor or "")]
    done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def bench(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Both starts, in turns."""
    build(folder)
    cursor = folder / "cursor.json"
    cursor.write_text(json.dumps(cursor_at(folder, STEP)))
    found = [[started(folder, at) for at in (None, cursor)] for _ in range(rounds)]
    rows = []
    for number, step in enumerate((0, STEP)):
        turns = [turn[number] for turn in found]
        row: dict[str, Any] = {"step": step, "samples": sum(SHARDS.values()) * PER_SHARD}
        for name in ("imports", "planned", "loader"):
            times = [turn[name] for turn in turns]
            row |= {f"{name}_seconds": round(median(times), 3), f"{name}_seconds_best": round(min(times), 3)}
        rows.append(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="starts at each step (default: 5)")
    parser.add_argument("--dir", type=Path, help="where shards are made (default: the temporary folder; 150 MB)")
    parser.add_argument("--save", action="store_true", help="write results/resume.json too")
    parser.add_argument("--start", nargs=3, metavar=("FOLDER", "BEGAN", "CURSOR"), help="one start (used by itself)")
    arguments = parser.parse_args()
    if arguments.start:
        folder, began, cursor = arguments.start
        state = json.loads(Path(cursor).read_text()) if cursor else None
        print(json.dumps(start(Path(folder), state, float(began))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        tell({"bench": "resume", "rows": bench(Path(name), arguments.rounds)}, arguments.save)


if __name__ == "__main__":
    main()
