"""NLVR for an image-text matching run: shards of true statements, of questions, of questions held out, and a test file.

    python -m tools.nlvr_data RAW --out DIR

RAW holds captions/train.jsonl, instruct/train.json, eval/matching_nlvr_test.jsonl and images/ (the layout of
configs/data/real.yaml's header); records of images under nlvr/ are used. Every 12th sentence of the development split
is held out for tuning with all its panels, and no picture that is one of these byte for byte is trained on.
DIR/test.jsonl has the statements of the test file whose picture is not, byte for byte, one of the development split.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.entry import run, setup
from mmtrain.config.errors import DataError
from tools.demo_data import lines
from tools.make_shards import make_shards
from tools.train_tokenizer import train

HELD_OUT_EVERY = 12
VOCAB_SIZE = 512
CAPTIONS, TEST = "captions/train.jsonl", "eval/matching_nlvr_test.jsonl"

Record = dict[str, Any]


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="folder of the raw files")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    args = parser.parse_args()
    for name, count in build(args.raw, args.out).items():
        print(f"{args.out / name}: {count} records")
    return 0


def build(raw: Path, out: Path) -> dict[str, int]:
    """Write tokenizer.json and the shards under the new folder `out`; returns the records of each.

    DataError: `out` holds something already, a raw file is missing, or RAW has no record of NLVR.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"output {out}: exists already; choose another folder or delete it")
    told, tested = (of_nlvr(map(json.loads, read(raw / file).splitlines())) for file in (CAPTIONS, TEST))
    asked = of_nlvr(json.loads(read(raw / "instruct" / "train.json")))
    if not told or not asked:
        raise DataError(f"{raw}: {len(told)} captions and {len(asked)} questions about images under nlvr/; both needed")
    kept_back = [record for record in asked if held_out(record)]
    seen = {content(raw, record) for record in kept_back}
    parts = {
        "captions": [record for record in told if not held_out(record) and content(raw, record) not in seen],
        "questions": [record for record in asked if not held_out(record) and content(raw, record) not in seen],
        "held_out": kept_back,
    }
    known = {content(raw, record) for record in [*told, *asked]}
    test = [record for record in tested if content(raw, record) not in known]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    partial.mkdir(parents=True)
    files = {name: partial / f"{name}.jsonl" for name in parts}
    for name, records in parts.items():
        lines(files[name], records)
    tokenizer = train([files["captions"], files["questions"]], VOCAB_SIZE, partial / "tokenizer.json")
    for name, file in files.items():
        make_shards("captions" if name == "captions" else "instruct", file, raw / "images", partial / name, tokenizer)
    lines(partial / "test.jsonl", test)
    partial.replace(out)
    return {name: len(records) for name, records in parts.items()} | {"test.jsonl": len(test)}


def read(file: Path) -> bytes:
    """A raw file. DataError: it is not there."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{file}: no such file; RAW is the folder with captions/, instruct/, eval/ and images/"
        ) from None


def of_nlvr(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if str(record["image"]).startswith("nlvr/")]


def content(raw: Path, record: Record) -> bytes:
    """A digest of the record's picture."""
    return hashlib.sha256(read(raw / "images" / record["image"])).digest()


def held_out(record: Record) -> bool:
    """By the sentence's number, nlvr/dev-SENTENCE-SET-ORDER.png: the orders of a set show the same boxes."""
    return int(record["image"].split("-")[1]) % HELD_OUT_EVERY == 0


if __name__ == "__main__":
    run(main)
