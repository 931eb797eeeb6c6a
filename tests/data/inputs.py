"""Small real inputs for the tests of data and tools: pictures, records in every public format, a tokenizer."""

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from PIL import Image

from mmtrain.data.documents import BadSample, Found, decode_documents
from mmtrain.data.record import Document, IndexEntry
from mmtrain.data.shards import ShardWriter
from mmtrain.data.tokenizer import Tokenizer, train_bpe

TEXTS = (
    "Question: What is the colour of the shape?\nAnswer: green",
    "There is a red circle above the blue square. Is this true or false?",
    "A chat between a curious user and an artificial intelligence assistant.",
    "Two trees stand beside the river; it is raining, and nobody is at home.",
)


def picture(width: int = 8, height: int = 6, form: str = "PNG", colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """An image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, form)
    return buffer.getvalue()


def decode_document(entry: IndexEntry, members: Mapping[str, bytes], by: Tokenizer, shard: str) -> Document:
    """One document by itself; raises what makes it unusable."""
    (found,) = decode_documents([Found(shard, entry, members)], by)
    if isinstance(found, BadSample):
        raise found
    return found


@cache
def tokenizer(chat_template: str = "plain") -> Tokenizer:
    """A small byte-level BPE, the same for every test of a process."""
    return Tokenizer(_tokenizer_file(), chat_template)


@cache
def _tokenizer_file() -> Path:
    return train_bpe(TEXTS * 3, 400, Path(mkdtemp(prefix="mmtrain-test-")) / "tokenizer.json")


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Write `records` as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def write_tar(folder: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], per_shard: int = 100) -> list[Path]:
    """Write samples of (key, suffix -> content) as shards into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, per_shard)
    for key, members in samples:
        writer.write(key, members)
    writer.close()
    return sorted(folder.glob("*.tar"))


def question(text: str, answer: str) -> list[dict[str, str]]:
    """One pair of LLaVA turns."""
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


def raw_folder(folder: Path) -> dict[str, Path]:
    """One good input file for each format, with its pictures in `folder`; format -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, form, size in (("a.png", "PNG", (40, 10)), ("b.jpg", "JPEG", (7, 9)), ("c.webp", "WEBP", (16, 16))):
        (folder / name).write_bytes(picture(*size, form))
    instruct = [
        {"id": "one", "image": "a.png", "conversations": question("<image>\nWhat colour?", "red")},
        {
            "id": 7,
            "image": ["b.jpg", "c.webp"],
            "conversations": question("Compare <image> with <image>.", "equal") + question("Really?", "yes"),
        },
        {"id": "no/picture.v1", "conversations": question("Is fire cold?", "no")},
    ]
    books = [
        {
            "id": "book",
            "texts": ["A title", None, "First page.", "Second page.", None],
            "images": [None, "b.jpg", None, None, "a.png"],
            "metadata": {"licence": "CC BY"},
        },
        {"id": "short", "texts": [None, "Only one."], "images": ["c.webp", None]},
    ]
    captions = [
        {"image": "a.png", "caption": " A red bar. "},
        {"image": "b.jpg", "caption": "Dots and é."},
        {"image": "a.png", "caption": "The same bar again."},
    ]
    (folder / "instruct.json").write_text(json.dumps(instruct), "utf-8")
    return {
        "captions": write_lines(folder / "captions.jsonl", captions),
        "interleaved": write_lines(folder / "books.jsonl", books),
        "text": write_lines(folder / "text.jsonl", [{"id": "t0", "text": "Once upon a time."}, {"text": "The end."}]),
        "instruct": folder / "instruct.json",
    }
