"""The loader against its limits, on the same images and one core; and its memory.

    python -m tools.bench.loader images [--seconds 0.5] [--rounds 4] [--save]
    python -m tools.bench.loader memory [--save]           peak memory with 1 and 4 workers

images: `loader` is this package's Loader with one worker; `webdataset` is webdataset's pipeline with its own decoder
(Pillow) and a resize to the canvas; `decode` and `pillow` decode and resize from memory, nothing else: the limits of
the two. Rates are images per second of processor time of all processes involved, so that other work on the machine
counts less. All four take turns in every round, and ratios are taken within a round; medians over rounds. Images are
made here: smooth noise with the spectrum of photographs, 640 x 480, and small shapes as PNG, 100 x 100.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import webdataset
from PIL import Image

from mmtrain.config.schema import Connector, Data, Model, Recipe, Source, Vision
from mmtrain.data.image import Canvas, decode_image
from mmtrain.data.index import build_index, write_index
from mmtrain.data.loader import STEPS_AHEAD, Loader
from mmtrain.data.shards import ShardWriter
from mmtrain.data.tokenizer import Tokenizer, train_bpe
from tools.bench.record import tell

KINDS = ("photo baseline", "photo progressive", "small png")
SIZES = (112, 224, 336)
PICTURES = 96
PASS = 32
"""Images between two looks at the clock, which are not free."""
SHARD_BYTES = 64 << 20
"""What all shards of a measurement come to at most."""

LENGTH = 2048
PER_IMAGE = 64
IMAGES_A_PACK = 16
"""As many as a recipe allows unless it says otherwise; the token budget would hold more."""


# ---- images


def picture(kind: str, number: int) -> bytes:
    """One image file."""
    buffer = io.BytesIO()
    if kind == "small png":
        rng = np.random.default_rng(number)
        pixels = np.full((100, 100, 3), 200, np.uint8)
        for _ in range(4):
            top, left = rng.integers(0, 80, 2)
            pixels[top : top + 20, left : left + 20] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        photograph(number).save(buffer, "JPEG", quality=90, progressive="progressive" in kind)
    return buffer.getvalue()


@cache
def photograph(number: int, height: int = 480, width: int = 640) -> Image.Image:
    """Noise whose spectrum falls as that of photographs does."""
    spectrum = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum[0, 0] = 1
    noise = np.random.default_rng(number).standard_normal((3, height, width))
    planes = np.fft.irfft2(np.fft.rfft2(noise) / spectrum, (height, width))
    values = np.stack([planes[0] + 0.3 * plane for plane in planes], -1)
    return Image.fromarray(np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8))


def shards_of(folder: Path, files: Sequence[bytes]) -> Tokenizer:
    """Caption shards of the images, each as often as there is room: an epoch's beginning must not be all there is."""
    tokenizer = Tokenizer(train_bpe(["a picture of nothing in particular"], 400, folder / "tokenizer.json"))
    suffix = "png" if files[0][:4] == b"\x89PNG" else "jpg"
    times = min(32, max(1, SHARD_BYTES // sum(map(len, files))))
    writer = ShardWriter(folder, 128)
    for number, data in enumerate(list(files) * times):
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


def processor_seconds(processes: Sequence[int]) -> float:
    """Processor time that these processes have used, by their own clocks (what clock_getcpuclockid gives on Linux)."""
    return sum(time.clock_gettime((~process << 3) | 2) for process in processes)


def rate(work: Iterator[int], processes: Sequence[int], seconds: float) -> float:
    """Images per second of processor time of work that yields how many it has done."""
    for _ in range(1 + STEPS_AHEAD if len(processes) > 1 else 1):  # what workers had ready before does not count
        next(work)
    done, used = 0, processor_seconds(processes)
    while (spent := processor_seconds(processes) - used) < seconds:
        done += next(work)
    return done / spent


def loaded(loader: Loader) -> Iterator[int]:
    """Images of each step of the loader."""
    for step in loader:
        yield sum(int(batch.image_valid.sum()) for batch in step.micro_batches)


def repeated(files: Sequence[bytes], decode: Callable[[bytes], np.ndarray]) -> Iterator[int]:
    """Decoding from memory, for ever; yields after PASS images."""
    while True:
        for at in range(0, len(files), PASS):
            for data in files[at : at + PASS]:
                decode(data)
            yield PASS


def webdataset_pillow(folder: Path, size: int) -> Iterator[int]:
    """webdataset's pipeline as its documentation writes it, for ever."""

    def resized(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)

    urls = sorted(map(str, folder.glob("*.tar")))
    while True:
        dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg;png", "txt")
        for number, _ in enumerate(dataset.map_tuple(resized, lambda text: text), start=1):
            if number % PASS == 0:
                yield PASS


def pillow(data: bytes, size: int) -> np.ndarray:
    """An image by Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def bench_images(seconds: float, rounds: int) -> Iterator[dict[str, object]]:
    """All kinds and sizes."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    me = os.getpid()
    for kind in KINDS:
        files = [picture(kind, number) for number in range(PICTURES)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokenizer = shards_of(folder, files)
            for size in SIZES:
                canvas = Canvas(size, size)
                with Loader(recipe_of(folder, size, workers=1), tokenizer, 0, 1) as loader:
                    work = {
                        "decode": (repeated(files, lambda data, c=canvas: decode_image(data, c)), [me]),
                        "pillow": (repeated(files, lambda data, s=size: pillow(data, s)), [me]),
                        "webdataset": (webdataset_pillow(folder, size), [me]),
                        "loader": (loaded(loader), [me, *loader.worker_pids()]),
                    }
                    found = [{n: rate(*of, seconds) for n, of in work.items()} for _ in range(rounds)]
                yield {
                    "images": kind,
                    "size": size,
                    "per_processor_second": {n: round(median(turn[n] for turn in found), 1) for n in work},
                    "of_decode_alone": round(median(turn["loader"] / turn["decode"] for turn in found), 3),
                    "of_webdataset": round(median(turn["loader"] / turn["webdataset"] for turn in found), 2),
                    "its_ceiling": round(median(turn["decode"] / turn["pillow"] for turn in found), 2),
                    "packs_per_processor_second": round(median(t["loader"] for t in found) / IMAGES_A_PACK, 2),
                }


# ---- memory


def bench_memory() -> Iterator[dict[str, object]]:
    """Highest resident memory of the loading process, beyond what it held before, and of all its workers.

    `shared_mib` is the memory of packs on their way, once: it counts in all workers that wrote into it.
    """
    files = [picture(KINDS[0], number) for number in range(PICTURES)]
    with tempfile.TemporaryDirectory() as name:
        tokenizer = shards_of(Path(name), files)
        for workers in (1, 4):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = peak(os.getpid())
            with Loader(recipe_of(Path(name), 336, workers, batch=8), tokenizer, 0, 1) as loader:
                for _ in zip(range(12), loader, strict=False):
                    pass
                pids = loader.worker_pids()
                yield {
                    "workers": workers,
                    "trainer_mib": round(peak(os.getpid()) - before),
                    "workers_mib": [round(peak(pid)) for pid in pids],
                    "shared_mib": round(shared() / 2**20),
                }


def peak(pid: int) -> float:
    """MiB that a process has held at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def shared() -> int:
    """Bytes that this process's nameless memory takes."""
    sizes = {}
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very list
            if file.readlink().name.startswith("memfd:"):
                sizes[file.stat().st_ino] = 512 * file.stat().st_blocks
    return sum(sizes.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "memory"])
    parser.add_argument("--seconds", type=float, default=0.5, help="processor time of each measurement (images)")
    parser.add_argument("--rounds", type=int, default=4, help="times that each is measured (images)")
    parser.add_argument("--save", action="store_true", help="write results/loader_images.json or loader_memory.json")
    arguments = parser.parse_args()
    if arguments.what == "images":
        rows = []
        for row in bench_images(arguments.seconds, arguments.rounds):
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
        tell({"bench": "loader_images", "target": {"of_decode_alone": 0.9}, "rows": rows}, arguments.save)
    else:
        tell({"bench": "loader_memory", "rows": list(bench_memory())}, arguments.save)


if __name__ == "__main__":
    main()
