"""Readers of the public formats that users have: captions, interleaved (OBELICS), text, instruct (LLaVA).

Each yields a `Record` that is ready for a shard, or a `Problem` that says where, what and why. Nothing is written here.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.data.chat import IMAGE_MARK, Turn
from mmtrain.data.documents import Content, content_defect
from mmtrain.data.header import read_header

ROLES = {"human": "user", "gpt": "assistant"}
"""LLaVA's names of the speakers."""

_NOT_IN_KEY = re.compile(r"[^A-Za-z0-9_-]+")  # a dot would end the key, a slash would open a folder inside the tar


@dataclass(frozen=True)
class Record:
    """One record of the input, checked."""

    key: str
    """Its name in the shard."""
    content: Content
    """Texts, and images by the suffix of their member."""
    files: dict[str, Path]
    """Member suffix -> image file."""
    metadata: Any = None
    """The record's own `metadata` (titles, attribution), kept in KEY.json and never read."""

    def as_json(self) -> dict[str, Any]:
        """What KEY.json holds."""
        return self.content.as_json() | ({} if self.metadata is None else {"metadata": self.metadata})


class Problem(NamedTuple):
    """One record that cannot be used."""

    where: str
    """File, line or record number, and key if it has one."""
    why: str
    """What is wrong."""


class _Bad(Exception):
    """Why the record at hand cannot be used."""


Reader = Callable[[dict[str, Any], Path], tuple[Content, list[str]]]


def read_records(name: str, path: Path, images: Path, renumber: bool = False) -> Iterator[Record | Problem]:
    """Records and problems of the input file `path` in the format `name`, in input order.

    Image paths are relative to `images`. Keys are the records' ids (captions without id: image name and number);
    `renumber` numbers the records instead, for inputs whose ids repeat. DataError if the file is missing or empty.
    """
    reader = READERS[name]
    seen: dict[str, str] = {}
    found = False
    for number, (where, fields) in enumerate(_rows(path)):
        found = True
        if isinstance(fields, Problem):
            yield fields
            continue
        key = f"{number:08d}"
        try:
            if not isinstance(fields, dict):
                raise _Bad(f"a {type(fields).__name__}, expected an object with named fields")
            key = key if renumber else _key(fields, number)
            if key in seen:
                raise _Bad(f"same key as {seen[key]}; make the ids unique, or pass --renumber")
            seen[key] = where
            content, names = reader(fields, images)
            yield Record(key, *_with_files(content, names, images), fields.get("metadata"))
        except _Bad as error:
            yield Problem(f"{where} (key {key!r})", str(error))
    if not found:
        raise DataError(f"input {path}: no records in it; give a file with at least one")


def texts_of(path: Path) -> Iterator[str]:
    """Every text of an input file in any of the formats, or of a plain .txt: what a tokenizer is trained on."""
    if path.suffix == ".txt":
        yield _content(path)
        return
    for where, fields in _rows(path):
        if isinstance(fields, Problem) or not isinstance(fields, dict):
            raise DataError(f"{where}: {fields.why if isinstance(fields, Problem) else 'not an object'}; correct it")
        found = [fields.get("caption"), fields.get("text"), *(fields.get("texts") or [])]
        found += [turn.get("value") for turn in fields.get("conversations") or []]
        yield from (text.replace(IMAGE_MARK, "") for text in found if isinstance(text, str))


def _caption(fields: dict[str, Any], images: Path) -> tuple[Content, list[str]]:
    """`{"image": path, "caption": text}`."""
    image, caption = _field(fields, "image", str), _field(fields, "caption", str)
    return Content("caption", texts=(None, caption.strip()), images=("", None)), [image]


def _interleaved(fields: dict[str, Any], images: Path) -> tuple[Content, list[str]]:
    """`{"texts": [...], "images": [...]}` of equal length, one of each pair null (OBELICS)."""
    texts, names = _field(fields, "texts", list), _field(fields, "images", list)
    content = Content("interleaved", texts=tuple(texts), images=tuple(names))
    return content, content.image_names()


def _text(fields: dict[str, Any], images: Path) -> tuple[Content, list[str]]:
    """`{"text": text}`."""
    return Content("text", texts=(_field(fields, "text", str),), images=(None,)), []


def _instruct(fields: dict[str, Any], images: Path) -> tuple[Content, list[str]]:
    """LLaVA: `{"image": path or list, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}`."""
    found = fields.get("image")
    names = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(names, list):
        raise _Bad(f"image is {found!r}, expected a path or a list of paths")
    turns = []
    for number, turn in enumerate(_field(fields, "conversations", list)):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise _Bad(f"turn {number} lacks 'from' or 'value'")
        turns.append(Turn(ROLES.get(turn["from"], turn["from"]), turn["value"]))
    return Content("conversation", images=tuple(names), turns=tuple(turns)), names


READERS: dict[str, Reader] = {
    "captions": _caption,
    "interleaved": _interleaved,
    "text": _text,
    "instruct": _instruct,
}
"""Format name -> how one record of it is read."""


def _with_files(content: Content, names: list[str], images: Path) -> tuple[Content, dict[str, Path]]:
    """`content` with images named by their members' suffixes, and the files behind them."""
    defect = content_defect(content)
    if defect:
        raise _Bad(defect)
    suffixes: list[str] = []
    files: dict[str, Path] = {}
    for number, name in enumerate(names):
        file = images / name if isinstance(name, str) else images
        if not file.is_file():
            raise _Bad(f"image {name!r} does not exist in {images}; correct the path or pass --images")
        try:
            suffix = read_header(file.read_bytes()).suffix
        except ValueError as error:
            raise _Bad(f"image {name!r}: {error}") from None
        alone = len(names) == 1 and content.kind != "interleaved"
        suffixes.append(suffix if alone else f"{number}.{suffix}")
        files[suffixes[-1]] = file
    rest = iter(suffixes)
    named = tuple(None if image is None else next(rest) for image in content.images)
    return Content(content.kind, content.texts, named, content.turns), files


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    """The field `name`, which must be there and of type `kind`."""
    if name not in fields:
        raise _Bad(f"no field {name!r}, found {', '.join(sorted(fields)) or 'none'}")
    if not isinstance(fields[name], kind):
        raise _Bad(f"{name} is {fields[name]!r}, expected a {'text' if kind is str else 'list'}")
    return fields[name]


def _key(fields: dict[str, Any], number: int) -> str:
    """Key of a record: its id, else its image's name and its number, else its number."""
    if "id" in fields:
        return _NOT_IN_KEY.sub("_", str(fields["id"])) or f"{number:08d}"
    image = fields.get("image")
    return f"{_NOT_IN_KEY.sub('_', Path(image).stem)}-{number:08d}" if isinstance(image, str) else f"{number:08d}"


def _content(path: Path) -> str:
    """Text of an input file; DataError if it is missing, empty or not UTF-8."""
    if not path.is_file():
        raise DataError(f"input {path}: no such file; correct the path")
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"input {path}: not UTF-8 text ({error}); convert it") from None
    if not content.strip():
        raise DataError(f"input {path}: empty; give a file with at least one record")
    return content


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of a JSON list or of JSON lines; a broken line is a Problem in the record's place.

    A JSON list with a syntax error is a DataError: nothing behind the error can be trusted.
    """
    content = _content(path)
    if content.lstrip().startswith("["):
        try:
            records = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"input {path}, line {error.lineno}: broken JSON ({error.msg}); correct it") from None
        for number, record in enumerate(records):
            yield f"{path}, record {number}", record
        return
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            yield where, Problem(where, f"broken JSON ({error.msg} at column {error.colno})")
