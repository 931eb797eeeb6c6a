"""The planner alone: samples a second, and the cost of starting and of resuming far inside ten million samples.

    python -m tools.bench.planner [--rounds 5] [--save]

Indexes are parsed, hashed and checked on the way, but come from memory, not from gigabytes of files. Each round plans
another 3,840 packs; rates are of processor time, the median and the best round (other work on the machine slows the
others down). `start` and `resume` are from the constructor to the first planned step, at step 0 and at step 100,000.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from mmtrain.config.schema import Data
from mmtrain.config.tokens import TokenKind
from mmtrain.data.columns import Columns, Index
from mmtrain.data.image import Canvas
from mmtrain.data.index import VERSION, open_folder
from mmtrain.data.ordering import Sizer
from mmtrain.data.plan import Planner
from mmtrain.data.record import IndexEntry, IndexHeader, Member, Segment
from mmtrain.data.tokenizer import Tokenizer, train_bpe
from tools.bench.record import tell

PACKS = 3840
SETTINGS = ((2048, 32, 64), (2048, 16, 144), (4096, 32, 144), (512, 16, 64), (4096, 16, 144))
"""Length, most images, tokens of an image; in the last one images run out before tokens do, as in configs/data/mm1."""


def synthetic(kind: str, rng: np.random.Generator, samples: int) -> Columns:
    """Sizes of one shard of captions, illustrated documents or texts, as real ones are distributed."""
    entries = []
    image = Segment(TokenKind.IMAGE, width=640, height=480)
    for number in range(samples):
        text = int(rng.lognormal({"captions": 2.8, "interleaved": 3.5, "text": 6.0}[kind], 0.8)) + 4
        segments = {
            "captions": (image, Segment(TokenKind.TEXT, text, text)),
            "interleaved": (Segment(TokenKind.TEXT, text, text), image) * int(rng.integers(1, 8)),
            "text": (Segment(TokenKind.TEXT, text, text),),
        }[kind]
        members = (Member("json", 512, 300), Member("jpg", 2048, 40_000))
        entries.append(IndexEntry(f"{number:09d}", 45_000 * number, 45_000, "caption", members, segments))
    return Columns.of(entries)


def bench_planner(rounds: int) -> Iterator[dict[str, object]]:
    """Samples planned per second of processor time, indexes parsed and checked on the way; and resuming far inside."""
    weights, per_shard, samples = {"captions": 45.0, "interleaved": 45.0, "text": 10.0}, 1000, 10_000_000
    rng = np.random.default_rng(0)
    payloads = {name: synthetic(name, rng, per_shard).to_bytes() for name in weights}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Tokenizer(train_bpe(["x"], 400, folder / "tokenizer.json"))
        share = {"captions": 0.7, "interleaved": 0.2, "text": 0.1}
        for source, (payload, lengths) in payloads.items():
            (folder / source).mkdir()
            for number in range(int(share[source] * samples / per_shard)):
                header = IndexHeader(
                    VERSION, tokenizer.hash, f"http://x/{source}{number:06d}.tar", 1, "", per_shard, 0, 0, 0, 0
                )
                line = asdict(header) | {"lengths": lengths, "payload_sha256": sha256(payload).hexdigest()}
                (folder / source / f"{number:06d}.index").write_text(json.dumps(line) + "\n")

        def read(path: str) -> Index:
            """What reading the file costs, without gigabytes of files."""
            source = Path(path).parent.name
            payload, lengths = payloads[source]
            sha256(payload).hexdigest()
            header = IndexHeader(VERSION, "", "", 1, "", per_shard, 0, 0, 0, 0)
            return Index(path, header, Columns.from_bytes(payload, lengths))

        for length, images, per_image in SETTINGS:
            data = Data(tokenizer="", sequence_length=length, max_images=images, global_batch=64)
            began = time.process_time()
            shards = {source: open_folder(folder / source, tokenizer) for source in weights}
            opened = time.process_time() - began

            def fresh(data: Data = data, shards: dict = shards, per_image: int = per_image) -> Planner:
                return Planner(shards, data, 0, Sizer(Canvas(224, 224), per_image), weights, read=read)

            before = resident()
            planner = fresh()
            planner.next_step()
            first = time.process_time() - began
            memory = resident() - before
            found = [planned(planner) for _ in range(rounds)]
            counts = {source: len(of_source) * per_shard for source, of_source in shards.items()}
            cursor = later(planner.cursor(), 100_000 * 64 - planner.packs, counts)
            began = time.process_time()
            resumed = fresh()
            resumed.restore(cursor)
            resumed.next_step()
            yield {
                "sequence_length": length,
                "image_tokens": per_image,
                "max_images": images,
                "samples": samples,
                "documents_per_pack": round(found[-1]["documents"] / PACKS, 2),
                "samples_per_second": round(median(turn["documents"] / turn["seconds"] for turn in found)),
                "samples_per_second_best": round(max(turn["documents"] / turn["seconds"] for turn in found)),
                "packs_per_second": round(median(PACKS / turn["seconds"] for turn in found)),
                "padding": round(median(1 - turn["tokens"] / PACKS / length for turn in found), 4),
                "longest_wait": max(turn["wait"] for turn in found),
                "headers_seconds": round(opened, 3),
                "start_seconds": round(first - opened, 3),
                "resume_at_step_100000_seconds": round(time.process_time() - began, 3),
                "start_mib": round(memory, 1),
                "resume_mib": round(resident() - before, 1),
                "cursor_bytes": len(json.dumps(cursor)),
            }


def planned(planner: Planner) -> dict[str, float]:
    """What the next PACKS packs hold, and processor seconds to plan them."""
    documents = tokens = wait = 0
    used = time.process_time()
    for _ in range(PACKS // 64):
        for pack in planner.next_step().packs:
            documents += len(pack)
            tokens += sum([document.tokens for document in pack])
        wait = max(wait, planner.longest_wait)
    return {"documents": documents, "tokens": tokens, "wait": wait, "seconds": time.process_time() - used}


def resident() -> float:
    """MiB that this process holds."""
    return psutil.Process().memory_info().rss / 2**20


def later(cursor: dict, packs: int, samples: dict[str, int]) -> dict:
    """The same cursor as it would look so many packs later: counters moved, the window kept."""
    moved = json.loads(json.dumps(cursor)) | {"packs": cursor["packs"] + packs}
    for name, source in moved["sources"].items():
        drawn = source["next"][0] * packs // cursor["packs"] // samples[name] * samples[name]
        first, *rest = source["waiting"].split(",")
        ordinal, part, entered = map(int, first.split())
        source["waiting"] = ",".join([f"{ordinal + drawn} {part} {entered + packs}", *rest])
        source["next"][0] += drawn
        source["served"] += source["served"] * packs // cursor["packs"]
    return moved


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times 3,840 packs of each setting (default: 5)")
    parser.add_argument("--save", action="store_true", help="write results/planner.json too")
    arguments = parser.parse_args()
    rows = list(bench_planner(arguments.rounds))
    tell({"bench": "planner", "target": {"samples_per_second": 200_000}, "rows": rows}, arguments.save)


if __name__ == "__main__":
    main()
