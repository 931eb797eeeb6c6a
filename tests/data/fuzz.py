"""Mutated shards, indexes and JSON members: no crash, no hang, each loss in the ledger, all others where they were.

python -m tests.data.fuzz --count 5000 [--seed 0]

Each case starts from one good shard. What may happen: a DataError (the file as a whole is refused, in words), or packs
in which every sample is either as it was planned, or padding with a line in the ledger.
"""

import argparse
import io
import json
import random
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image

from mmtrain.config.errors import DataError
from mmtrain.data.collate import Shape
from mmtrain.data.columns import COLUMNS, Index
from mmtrain.data.image import Canvas
from mmtrain.data.index import build_index, index_path, read_index, write_index
from mmtrain.data.ordering import Planned, Sizer
from mmtrain.data.reader import Reader, ReaderSpec, ReadPack
from mmtrain.data.record import IndexEntry
from tests.data.inputs import picture, question, tokenizer
from tests.data.mutations import BYTES, bomb, header, odd_json

SECONDS = 20
"""A case that takes more processor time is a hang."""

CANVAS = Canvas(16, 16, max_pixels=1_000_000)
SHAPE = Shape(CANVAS, 4, 512)
Members = dict[str, bytes]


def noise(form: str, seed: int, size: tuple[int, int] = (24, 18)) -> bytes:
    """A picture whose bytes matter."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@cache
def samples() -> tuple[tuple[str, Members], ...]:
    """The good shard: every kind of document and of image."""

    def document(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    pair = zip(("user", "assistant"), question("<image> What?", "red"), strict=True)
    turns = [{"role": role, "text": turn["value"]} for role, turn in pair]
    book = document(kind="interleaved", texts=["One", None, "Two", None], images=[None, "0.png", None, "1.webp"])
    caption = document(kind="caption", texts=[None, "a bar"], images=["jpg", None])
    last = document(kind="caption", texts=[None, "the end"], images=["png", None])
    return (
        ("caption", {"json": caption, "jpg": noise("JPEG", 1)}),
        ("foreign", {"png": noise("PNG", 2), "txt": b"A picture of noise."}),
        ("book", {"json": book, "0.png": noise("PNG", 3), "1.webp": noise("WEBP", 4)}),
        ("text", {"json": document(kind="text", texts=["Once upon a time"], images=[None])}),
        ("talk", {"json": document(kind="conversation", turns=turns, images=["png"]), "png": noise("PNG", 5)}),
        ("last", {"json": last, "png": picture()}),
    )


def tar_of(content: Sequence[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """A tar of samples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in content:
            for suffix, body in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


# ---- cases


class Case:
    """One folder with the good shard, and what a clean reader makes of it."""

    def __init__(self, folder: Path) -> None:
        self.tar = folder / "shard-000000.tar"
        self.good = tar_of(samples())
        self.tar.write_bytes(self.good)
        write_index(build_index(self.tar, tokenizer())[0])
        self.good_index = index_path(self.tar).read_bytes()
        self.plan = self.planned(read_index(index_path(self.tar)))
        self.clean = self.read(self.plan)
        assert not self.clean.ledger and len(self.clean.arrays.keys) == len(samples())

    def planned(self, index: Index) -> list[Planned]:
        """One pack of all usable samples, as far as they fit."""
        tokens, panels = Sizer(CANVAS, SHAPE.image_tokens).rooms(index.columns)
        pack, room = [], SHAPE.length
        for row, length in enumerate(tokens.tolist()):
            if 0 < length <= room:
                pack.append(Planned(row, 0, str(index_path(self.tar)), row, length, int(panels[row])))
                room -= length
        return pack

    def read(self, pack: Sequence[Planned]) -> ReadPack:
        """The pack by a new reader."""
        spec = ReaderSpec(str(tokenizer().path), "plain", SHAPE, ("source",))
        return Reader(spec, tokenizer()).read(pack)

    def restore(self) -> None:
        """Put the good files back."""
        self.tar.write_bytes(self.good)
        index_path(self.tar).write_bytes(self.good_index)

    # Each returns what happened, in a word; anything but DataError that escapes is a finding.

    def tar_before_indexing(self, rng: random.Random) -> str:
        """A foreign tar that is damaged or hostile."""
        self.tar.write_bytes(rng.choice((*BYTES, header, header))(rng, self.good))
        index, damage = build_index(self.tar, tokenizer())
        written = read_index(write_index(index))
        assert written == index
        pack = self.planned(index)
        found = self.read(pack)
        check_ledger(found, pack, index.entries)
        return "damage" if damage else "ledger" if found.ledger or index.header.unusable else "good"

    def member_before_indexing(self, rng: random.Random) -> str:
        """One file of one sample is garbage; all other samples are as they were."""
        content = [(key, dict(members)) for key, members in samples()]
        at = rng.randrange(len(content))
        suffix = rng.choice(list(content[at][1]))
        member = content[at][1][suffix]
        hostile: tuple[Callable[[random.Random, bytes], bytes], ...] = (
            (odd_json,) if suffix == "json" else (bomb,) if suffix != "txt" else ()
        )
        content[at][1][suffix] = rng.choice((*BYTES, *hostile, *hostile, *hostile))(rng, member)
        self.tar.write_bytes(tar_of(content))
        index, damage = build_index(self.tar, tokenizer())
        assert not damage and len(index.entries) == len(samples())
        write_index(index)
        pack = self.planned(index)
        found = self.read(pack)
        check_ledger(found, pack, index.entries)
        self.check_others(found, pack, {content[at][0]})
        return "ledger" if found.ledger or index.header.unusable else "good"

    def tar_after_indexing(self, rng: random.Random) -> str:
        """A disk or a copy went bad; the plan is that of the good shard."""
        changed = rng.choice(BYTES)(rng, self.good)
        self.tar.write_bytes(changed)
        runs = {e.key: slice(e.offset, e.offset + e.size) for e in read_index(index_path(self.tar)).entries}
        touched = {key for key, run in runs.items() if changed[run] != self.good[run]}
        found = self.read(self.plan)
        assert found.arrays.keys == self.clean.arrays.keys
        self.check_others(found, self.plan, touched)
        assert {line["key"] for line in found.ledger} <= touched
        return "ledger" if found.ledger else "good"

    def index_file(self, rng: random.Random) -> str:
        """An index with random damage, or with damage whose hash was made to fit."""
        mutate = rng.choice(BYTES)
        if rng.random() < 0.5:
            changed = mutate(rng, self.good_index)
        else:
            first, _, payload = self.good_index.partition(b"\n")
            payload = mutate(rng, payload)
            fields = json.loads(first) | {"payload_sha256": sha256(payload).hexdigest()}
            if rng.random() < 0.3:
                name = rng.choice([*COLUMNS, "samples"])
                where = fields["lengths"] if name in COLUMNS else fields
                where[name] = rng.choice((0, -1, 1 << 62, "1", None, where[name] + 1))
            changed = json.dumps(fields).encode() + b"\n" + payload
        index_path(self.tar).write_bytes(changed)
        index = read_index(index_path(self.tar))
        pack = self.planned(index)
        found = self.read(pack)
        check_ledger(found, pack, index.entries)
        return "good" if changed == self.good_index else "accepted"

    def check_others(self, found: ReadPack, pack: Sequence[Planned], bad: set[str]) -> None:
        """Every sample that was not touched holds what it held, at its place."""
        starts = np.cumsum([0] + [planned.tokens for planned in pack])
        mine = dict(zip(found.arrays.keys, starts, strict=False))
        theirs = np.cumsum([0] + [planned.tokens for planned in self.plan])
        for key, planned, start in zip(self.clean.arrays.keys, self.plan, theirs, strict=False):
            if key not in bad:
                assert key in mine, f"{key} is missing"
                for name in ("tokens", "labels", "weights", "positions", "kind"):
                    here = getattr(found.arrays, name)[mine[key] :][: planned.tokens]
                    assert np.array_equal(here, getattr(self.clean.arrays, name)[start:][: planned.tokens]), key
                pixels = pixels_of(found, mine[key], planned), pixels_of(self.clean, start, planned)
                assert np.array_equal(*pixels), key


def pixels_of(read: ReadPack, start: int, planned: Planned) -> np.ndarray:
    """Images of the sample whose place in the pack begins at `start`."""
    arrays = read.arrays
    return arrays.panels[(arrays.starts >= start) & (arrays.starts < start + planned.tokens)]


def check_ledger(found: ReadPack, pack: Sequence[Planned], entries: Sequence[IndexEntry]) -> None:
    """A sample is in the pack or in the ledger, never in both, never in neither."""
    bad = Counter(line["key"] for line in found.ledger)
    assert all(line["reason"] and line["shard"] and line["source"] == "source" for line in found.ledger)
    held = set(found.arrays.document_ids.tolist()) - {-1}
    for number, planned in enumerate(pack):
        key = entries[planned.row].key
        assert (number in held) != bool(bad[key]) or len([e for e in entries if e.key == key]) > 1, key


CASES = (Case.tar_before_indexing, Case.member_before_indexing, Case.tar_after_indexing, Case.index_file)


def _too_long(_: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"a case took more than {SECONDS} s")


def campaign(count: int, seed: int) -> Counter[str]:
    """Run so many cases; returns outcomes by kind of case. The first finding is raised with its seed in a note."""
    outcomes: Counter[str] = Counter()
    before = signal.signal(signal.SIGPROF, _too_long)
    try:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(Path(folder))
            for number in range(seed, seed + count):
                kind = CASES[number % len(CASES)]
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    outcome = kind(case, random.Random(number))
                except DataError as error:
                    assert "\n" not in str(error)[:20] and len(str(error)) > 20
                    outcome = "refused"
                except BaseException as error:
                    error.add_note(
                        f"case {number} ({kind.__name__}): python -m tests.data.fuzz --count 1 --seed {number}"
                    )
                    raise
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                outcomes[f"{kind.__name__}: {outcome}"] += 1
                case.restore()
    finally:
        signal.signal(signal.SIGPROF, before)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(json.dumps({"cases": args.count, **dict(sorted(campaign(args.count, args.seed).items()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
