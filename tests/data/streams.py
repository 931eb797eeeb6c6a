"""Real shards of two sources, recipes that read them, and steps as plain values."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mmtrain.config.schema import Data, Recipe, Source
from mmtrain.data.index import build_index, write_index
from mmtrain.data.loader import Loader
from mmtrain.data.record import Step
from tests.data.inputs import TEXTS, picture, tokenizer, write_tar
from tests.tiny import recipe as tiny

CAPTIONS, PLAIN = 60, 40


def caption(number: int, image: bytes | None = None) -> tuple[str, dict[str, bytes]]:
    form = ("JPEG", "PNG")[number % 2]
    content = {"kind": "caption", "texts": [None, f"a shape {number}"], "images": ["jpg", None]}
    pixels = picture(64, 48, form, (number, 2 * number, 255 - number))
    return f"c{number}", {"json": json.dumps(content).encode(), "jpg": image or pixels}


def plain(number: int) -> tuple[str, dict[str, bytes]]:
    words = TEXTS[number % 4] * (number % 3 + 1)
    content = {"kind": "text", "texts": [f"{number} {words}"], "images": [None]}
    return f"t{number}", {"json": json.dumps(content).encode()}


def index(folder: Path) -> None:
    for tar in folder.glob("*.tar"):
        write_index(build_index(tar, tokenizer())[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of real shards: captions and text."""
    root = tmp_path_factory.mktemp("shards")
    write_tar(root / "captions", [caption(n) for n in range(CAPTIONS)], 13)
    write_tar(root / "text", [plain(n) for n in range(PLAIN)], 13)
    for name in ("captions", "text"):
        index(root / name)
    return root


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def remote(folder: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Folders of indexes alone, whose tars come over HTTP; and the address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name in ("captions", "text"):
        (tmp_path / name).mkdir()
        for tar in sorted((folder / name).glob("*.tar")):
            index, _ = build_index(tar, tokenizer(), f"{address}/{name}/{tar.name}")
            write_index(index, tmp_path / name / f"{tar.stem}.index")
    yield tmp_path, address
    server.shutdown()
    server.server_close()


def make(folder: Path, recipe_changes: dict | None = None, **data: object) -> Recipe:
    base = Data(
        sources={
            "captions": Source(str(folder / "captions"), 0.6),
            "off": Source("nowhere", 0.0),
            "text": Source(str(folder / "text"), 0.4),
        },
        tokenizer=str(tokenizer().path),
        sequence_length=128,
        global_batch=8,
        workers=0,
    )
    return replace(tiny(), **{"data": replace(base, **data), "steps": 5, **(recipe_changes or {})})


def steps(recipe: Recipe, rank: int = 0, size: int = 1, **options: object) -> list[Step]:
    with Loader(recipe, tokenizer(), rank, size, **options) as loader:
        return list(loader)


def packs(step: Step) -> list[dict[str, object]]:
    """Each pack of a step as plain values, wherever it lay in a micro-batch."""
    out = []
    for batch in step.micro_batches:
        for row in range(len(batch.tokens)):
            inside = (batch.image_slots[:, 0] // batch.tokens.shape[1] == row) & batch.image_valid
            names = ("tokens", "labels", "weights", "document_ids", "positions", "kind", "source_ids")
            out.append({name: getattr(batch, name)[row].tolist() for name in names})
            out[-1]["images"] = batch.images[inside].tolist()
            out[-1]["keys"] = batch.keys[row]
    return out
