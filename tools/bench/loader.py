"""The loader against its limits, on the same images and one core; the planner; memory; the cost of a resume.

    python -m tools.bench.loader images [--seconds 2]      one JSON line for each kind and size of image
    python -m tools.bench.loader planner                   samples/s by recipe-like settings; resume at step 100,000
    python -m tools.bench.loader memory                    peak memory with 1 and 4 workers

images: `loader` is this package's Loader with one worker; `webdataset` is webdataset's pipeline with its own decoder
(Pillow) and a resize to the canvas; `decode` and `pillow` decode and resize from memory, nothing else: the limits of
the two. Rates are images per second of processor time of all processes involved, so that other work on the machine
does not count. Images are made here: smooth noise with the spectrum of photographs, and small shapes as PNG.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import webdataset
from PIL import Image

from mmtrain.config.schema import Connector, Data, Model, Recipe, Source, Vision
from mmtrain.config.tokens import TokenKind
from mmtrain.data.columns import Columns, Index
from mmtrain.data.image import Canvas, decode_image
from mmtrain.data.index import VERSION, build_index, open_folder, write_index
from mmtrain.data.loader import Loader
from mmtrain.data.ordering import Sizer
from mmtrain.data.plan import Planner
from mmtrain.data.record import IndexEntry, IndexHeader, Member, Segment
from mmtrain.data.shards import ShardWriter
from mmtrain.data.tokenizer import Tokenizer, train_bpe

KINDS = ("photo baseline", "photo progressive", "small png")
SIZES = (112, 224, 336)
PICTURES = 96
LENGTH = 2048
PER_IMAGE = 64


# ---- images


def picture(kind: str, number: int) -> bytes:
    """One image file."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    if kind == "small png":
        pixels = np.full((100, 100, 3), 200, np.uint8)
        for _ in range(4):
            top, left = rng.integers(0, 80, 2)
            pixels[top : top + 20, left : left + 20] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()
    height, width = 480, 640
    spectrum = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum[0, 0] = 1
    noise = rng.standard_normal((3, height, width))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / spectrum, (height, width))
    values = np.stack([planes[0] + 0.3 * plane for plane in planes], -1)
    pixels = np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90, progressive="progressive" in kind)
    return buffer.getvalue()


def shards_of(folder: Path, files: Sequence[bytes]) -> Tokenizer:
    """Caption shards of the images."""
    tokenizer = Tokenizer(train_bpe(["a picture of nothing in particular"], 400, folder / "tokenizer.json"))
    suffix = "png" if files[0][:4] == b"\x89PNG" else "jpg"
    writer = ShardWriter(folder, 32)
    for number, data in enumerate(files):
        writer.write(f"{number:06d}", {suffix: data, "txt": b"a picture of nothing in particular"})
    writer.close()
    for tar in folder.glob("*.tar"):
        write_index(build_index(tar, tokenizer)[0])
    return tokenizer


def recipe_of(folder: Path, size: int, workers: int, batch: int = 4) -> Recipe:
    """A recipe that reads the folder."""
    model = replace(
        Model(), vision=replace(Vision(), image_size=(size, size)), connector=replace(Connector(), num_tokens=PER_IMAGE)
    )
    data = Data(
        sources={"captions": Source(str(folder))},
        tokenizer=str(folder / "tokenizer.json"),
        sequence_length=LENGTH,
        global_batch=batch,
        micro_batch=1,
        workers=workers,
    )
    return replace(Recipe(name="bench", out=""), model=model, data=data, steps=1 << 40)


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    """Processor time that these processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def rate(work: Iterator[int], processes: Sequence[psutil.Process], seconds: float) -> tuple[float, float]:
    """Images per second of processor time, and of wall time, of work that yields how many it has done."""
    for _ in range(3):
        next(work)
    done, used, began = 0, processor_seconds(processes), time.perf_counter()
    while processor_seconds(processes) - used < seconds:
        done += next(work)
    return done / (processor_seconds(processes) - used), done / (time.perf_counter() - began)


def loaded(loader: Loader) -> Iterator[int]:
    """Images of each step of the loader."""
    for step in loader:
        yield sum(int(batch.image_valid.sum()) for batch in step.micro_batches)


def repeated(files: Sequence[bytes], decode: Callable[[bytes], np.ndarray]) -> Iterator[int]:
    """Decoding from memory, for ever."""
    while True:
        for data in files:
            decode(data)
            yield 1


def webdataset_pillow(folder: Path, size: int) -> Iterator[int]:
    """webdataset's pipeline as its documentation writes it, for ever."""

    def resized(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    urls = sorted(map(str, folder.glob("*.tar")))
    while True:
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg;png", "txt")
        for _ in dataset.map_tuple(resized, lambda text: text):
            yield 1


def pillow(data: bytes, size: int) -> np.ndarray:
    """An image by Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def bench_images(seconds: float) -> Iterator[dict[str, object]]:
    """All kinds and sizes."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    me = psutil.Process()
    for kind in KINDS:
        files = [picture(kind, number) for number in range(PICTURES)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer = shards_of(folder, files)
            for size in SIZES:
                canvas = Canvas(size, size)
                found: dict[str, tuple[float, float]] = {
                    "decode": rate(repeated(files, lambda data, c=canvas: decode_image(data, c)), [me], seconds),
                    "pillow": rate(repeated(files, lambda data, s=size: pillow(data, s)), [me], seconds),
                    "webdataset": rate(webdataset_pillow(folder, size), [me], seconds),
                }
                with Loader(recipe_of(folder, size, workers=1), tokenizer, 0, 1) as loader:
                    workers = [psutil.Process(pid) for pid in loader.worker_pids()]
                    found["loader"] = rate(loaded(loader), [me, *workers], seconds)
                ours, limit, theirs, ceiling = (found[n][0] for n in ("loader", "decode", "webdataset", "pillow"))
                yield {
                    "bench": "loader",
                    "images": kind,
                    "size": size,
                    "per_processor_second": {n: round(value, 1) for n, (value, _) in found.items()},
                    "per_second": {n: round(value, 1) for n, (_, value) in found.items()},
                    "of_decode_alone": round(ours / limit, 3),
                    "of_webdataset": round(ours / theirs, 2),
                    "its_ceiling": round(limit / ceiling, 2),
                    "packs_per_processor_second": round(ours / min(16, LENGTH // (PER_IMAGE + 8)), 2),
                }


# ---- planner


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


def bench_planner() -> Iterator[dict[str, object]]:
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

        for length, images, per_image in ((2048, 16, 64), (2048, 16, 144), (4096, 16, 144), (512, 16, 64)):
            data = Data(tokenizer="", sequence_length=length, max_images=images, global_batch=64)
            began = time.process_time()
            shards = {source: open_folder(folder / source, tokenizer) for source in weights}
            opened = time.process_time() - began

            def fresh(data: Data = data, shards: dict = shards, per_image: int = per_image) -> Planner:
                return Planner(shards, data, 0, Sizer(Canvas(224, 224), per_image), weights, read=read)

            planner = fresh()
            planner.next_step()
            first = time.process_time() - began
            used, documents, tokens, wait = time.process_time(), 0, 0, 0
            for _ in range(60):
                for pack in planner.next_step().packs:
                    documents += len(pack)
                    tokens += sum([planned.tokens for planned in pack])
                wait = max(wait, planner.longest_wait)
            used = time.process_time() - used
            counts = {source: len(of_source) * per_shard for source, of_source in shards.items()}
            cursor = later(planner.cursor(), 100_000 * 64 - planner.packs, counts)
            began = time.process_time()
            resumed = fresh()
            resumed.restore(cursor)
            resumed.next_step()
            yield {
                "bench": "planner",
                "sequence_length": length,
                "image_tokens": per_image,
                "max_images": images,
                "samples": samples,
                "documents_per_pack": round(documents / 60 / 64, 2),
                "samples_per_second": round(documents / used),
                "packs_per_second": round(60 * 64 / used),
                "padding": round(1 - tokens / 60 / 64 / length, 4),
                "longest_wait": wait,
                "open_seconds": round(opened, 3),
                "first_step_seconds": round(first - opened, 3),
                "step_100000_seconds": round(time.process_time() - began, 3),
                "cursor_bytes": len(json.dumps(cursor)),
            }


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


# ---- memory


def bench_memory() -> Iterator[dict[str, object]]:
    """Highest resident memory of the loading process and of all its workers."""
    files = [picture(KINDS[0], number) for number in range(PICTURES)]
    with tempfile.TemporaryDirectory() as name:
        tokenizer = shards_of(Path(name), files)
        before = peak(os.getpid())
        for workers in (1, 4):
            with Loader(recipe_of(Path(name), 336, workers, batch=8), tokenizer, 0, 1) as loader:
                for _ in zip(range(12), loader, strict=False):
                    pass
                each = [peak(pid) for pid in loader.worker_pids()]
            yield {
                "bench": "loader memory",
                "workers": workers,
                "before_mib": round(before),
                "trainer_mib": round(peak(os.getpid())),
                "workers_mib": [round(value) for value in each],
            }


def peak(pid: int) -> float:
    """MiB that a process has held at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "planner", "memory"])
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time of each measurement (images)")
    arguments = parser.parse_args()
    found = {"images": lambda: bench_images(arguments.seconds), "planner": bench_planner, "memory": bench_memory}
    for line in found[arguments.what]():
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
