"""The files that evaluations read: JSON lines of questions, statements or captions. One broken line is an error."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmtrain.config.errors import DataError


class Question(NamedTuple):
    """One line of a VQA file: `question_id`, `image` (may be missing: text alone), `question`, `answers`."""

    id: str
    image: str | None
    question: str
    answers: tuple[str, ...]


class Statement(NamedTuple):
    """One line of a matching file: `id`, `image`, `statement`, `label`."""

    id: str
    image: str
    statement: str
    label: bool


class Caption(NamedTuple):
    """One line of a caption file: `image`, `caption`, and maybe `id`."""

    id: str
    image: str
    caption: str


Item = TypeVar("Item", Question, Statement, Caption)


def read_questions(path: Path, images: Path, limit: int = 0) -> list[Question]:
    """The first `limit` questions (0: all). DataError: file, line or image that cannot be used."""

    def item(fields: "_Fields") -> Question:
        answers = fields.take("answers", list)
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{fields.where}: answers is {answers!r}, expected a list of texts, not empty")
        image = fields.take("image", str) if fields.values.get("image") is not None else None
        return Question(fields.take_id("question_id"), image, fields.take("question", str), tuple(answers))

    return _read(path, images, limit, item)


def read_statements(path: Path, images: Path, limit: int = 0) -> list[Statement]:
    """The first `limit` statements (0: all). DataError: file, line or image that cannot be used."""

    def item(fields: "_Fields") -> Statement:
        image, statement = fields.take("image", str), fields.take("statement", str)
        return Statement(fields.take_id("id"), image, statement, fields.take("label", bool))

    return _read(path, images, limit, item)


def read_captions(path: Path, images: Path, limit: int = 0) -> list[Caption]:
    """The first `limit` captions (0: all). DataError: file, line or image that cannot be used."""

    def item(fields: "_Fields") -> Caption:
        caption = fields.take("caption", str).strip()
        if not caption:
            raise DataError(f"{fields.where}: empty caption; leave the line out")
        return Caption(fields.take_id("id"), fields.take("image", str), caption)

    return _read(path, images, limit, item)


def image_names(path: Path) -> list[str]:
    """Every image that a file of any of these kinds names, each once, in order of appearance."""
    names = (fields.values.get("image") for fields in _lines(path))
    return list(dict.fromkeys(name for name in names if name is not None))


class _Fields(NamedTuple):
    """One line's fields, and where they stand."""

    where: str
    number: int
    values: dict[str, Any]

    def take(self, name: str, kind: type) -> Any:
        """The field `name`; DataError unless it is there and of type `kind`."""
        if name not in self.values:
            raise DataError(f"{self.where}: no field {name!r}, found {', '.join(sorted(self.values)) or 'none'}")
        if not isinstance(self.values[name], kind):
            words = {str: "a text", bool: "true or false", list: "a list"}[kind]
            raise DataError(f"{self.where}: {name} is {self.values[name]!r}, expected {words}")
        return self.values[name]

    def take_id(self, name: str) -> str:
        """The field that names the item, else the line's number."""
        return str(self.values.get(name, self.number))


def _read(path: Path, images: Path, limit: int, item: Callable[[_Fields], Item]) -> list[Item]:
    if limit < 0:
        raise DataError(f"limit {limit}: give how many lines of {path} to use, or 0 for all")
    found: list[Item] = []
    known: set[str | None] = {None}
    for fields in _lines(path):
        found.append(item(fields))
        name = found[-1].image
        if name not in known and not (images / name).is_file():
            raise DataError(
                f"{fields.where}: image {name!r} does not exist in {images}; correct the path or the folder"
            )
        known.add(name)
        if len(found) == limit:
            break
    return found


def _lines(path: Path) -> Iterator[_Fields]:
    """Fields of every line that is not blank; DataError if there is none."""
    if not path.is_file():
        raise DataError(f"evaluation data {path}: no such file; correct the path")
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"evaluation data {path}: not UTF-8 text ({error}); convert it") from None
    if not content.strip():
        raise DataError(f"evaluation data {path}: empty; give a file with at least one line")
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: broken JSON ({error.msg} at column {error.colno}); correct the line") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: a {type(values).__name__}, expected an object with named fields")
        yield _Fields(where, number, values)
