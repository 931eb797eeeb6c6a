import json
import re
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.errors import DataError
from mmtrain.data.formats import Problem, Record, read_records, texts_of
from tests.data.inputs import picture, question, raw_folder, write_lines


def read(name: str, path: Path, **options: Any) -> list[Record | Problem]:
    return list(read_records(name, path, path.parent, **options))


def problem(tmp_path: Path, name: str, record: Any) -> str:
    """The one problem of a file whose second record is `record`."""
    (tmp_path / "a.png").write_bytes(picture())
    good = {
        "captions": {"image": "a.png", "caption": "fine"},
        "interleaved": {"texts": ["fine"], "images": [None]},
        "text": {"text": "fine"},
        "instruct": {"conversations": question("fine?", "fine")},
    }[name]
    first, second = read(name, write_lines(tmp_path / "in.jsonl", [good, record]))
    assert isinstance(first, Record) and isinstance(second, Problem)
    assert second.where.startswith(f"{tmp_path / 'in.jsonl'}, line 2 (key ")
    return second.why


def test_captions(tmp_path: Path) -> None:
    records = read("captions", raw_folder(tmp_path)["captions"])
    assert [record.key for record in records] == ["a-00000000", "b-00000001", "a-00000002"]
    assert [record.content.texts[1] for record in records] == ["A red bar.", "Dots and é.", "The same bar again."]
    assert records[1].files == {"jpg": tmp_path / "b.jpg"} and records[1].content.images == ("jpg", None)


def test_interleaved(tmp_path: Path) -> None:
    book, short = read("interleaved", raw_folder(tmp_path)["interleaved"])
    assert book.content.images == (None, "0.jpg", None, None, "1.png")
    assert book.files == {"0.jpg": tmp_path / "b.jpg", "1.png": tmp_path / "a.png"}
    assert book.as_json()["metadata"] == {"licence": "CC BY"} and "metadata" not in short.as_json()
    assert short.content.images == ("0.webp", None)


def test_instruct_takes_lists_and_lines_several_images_and_none(tmp_path: Path) -> None:
    path = raw_folder(tmp_path)["instruct"]
    one, two, none = read("instruct", path)
    assert (one.key, two.key, none.key) == ("one", "7", "no_picture_v1")
    assert (one.content.images, two.content.images, none.content.images) == (("png",), ("0.jpg", "1.webp"), ())
    assert [turn.role for turn in two.content.turns] == ["user", "assistant"] * 2
    lines = write_lines(tmp_path / "instruct.jsonl", json.loads(path.read_text("utf-8")))
    assert read("instruct", lines) == [one, two, none]


def test_an_image_is_named_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "liar.png").write_bytes(picture(form="JPEG"))
    (record,) = read("captions", write_lines(tmp_path / "c.jsonl", [{"image": "liar.png", "caption": "x"}]))
    assert list(record.files) == ["jpg"]


@pytest.mark.parametrize(
    ("name", "record", "why"),
    [
        ("captions", {"image": "gone.png", "caption": "x"}, "image 'gone.png' does not exist in .*; correct the path"),
        ("captions", {"image": "in.jsonl", "caption": "x"}, r"image 'in.jsonl': not an image \(no known header\)"),
        ("captions", {"image": "a.png", "caption": "  "}, "empty caption"),
        ("captions", {"image": "a.png"}, "no field 'caption', found image"),
        ("captions", {"image": "a.png", "caption": 3}, "caption is 3, expected a text"),
        ("captions", ["a.png", "x"], "a list, expected an object with named fields"),
        ("text", {"text": ""}, "empty text"),
        ("text", {}, "no field 'text', found none"),
        (
            "interleaved",
            {"texts": ["a", None], "images": [None]},
            "texts has 2 items but images 1; they must be equally long",
        ),
        (
            "interleaved",
            {"texts": ["a", None], "images": [None, None]},
            r"texts\[1\] and images\[1\] are both null; exactly one of each pair must be null",
        ),
        ("interleaved", {"texts": ["a"], "images": ["a.png"]}, r"texts\[0\] and images\[0\] are both given"),
        ("interleaved", {"texts": ["a", "\n"], "images": [None, None]}, r"empty texts\[1\]"),
        ("interleaved", {"texts": ["a", 5], "images": [None, None]}, r"texts\[1\] is 5, not text"),
        ("interleaved", {"texts": [None], "images": [7]}, "images holds '7', not text"),
        ("interleaved", {"texts": [], "images": []}, "neither texts nor images"),
        (
            "instruct",
            {"conversations": question("a", "b")[::-1]},
            "turn 0 is from 'gpt', expected 'human'; human and gpt must alternate, human first",
        ),
        (
            "instruct",
            {"conversations": [*question("a", "b"), {"from": "gpt", "value": "c"}]},
            "turn 2 is from 'gpt', expected 'human'",
        ),
        (
            "instruct",
            {"conversations": [{"from": "system", "value": "x"}]},
            "turn 0 is from 'system', expected 'human'",
        ),
        ("instruct", {"conversations": question("a", "b")[:1]}, "1 turns, the last one without an answer"),
        ("instruct", {"conversations": []}, "0 turns"),
        ("instruct", {"conversations": question("a", " ")}, "turn 1 .from 'gpt'. is empty"),
        ("instruct", {"conversations": [{"value": "x"}]}, "turn 0 lacks 'from' or 'value'"),
        (
            "instruct",
            {"image": "a.png", "conversations": question("no mark", "b")},
            "0 <image> in the turns but 1 images; there must be one for each image",
        ),
        (
            "instruct",
            {"image": ["a.png"], "conversations": question("<image> <image>", "b")},
            "2 <image> in the turns but 1 images",
        ),
        ("instruct", {"conversations": question("<image>?", "b")}, "1 <image> in the turns but 0 images"),
        ("instruct", {"image": {}, "conversations": question("a", "b")}, "image is {}, expected a path or a list"),
        (
            "instruct",
            {"image": "a.png", "conversations": question("a", "see <image>")},
            "turn 1 is an answer that holds <image>; images belong to human turns",
        ),
    ],
)
def test_bad_records(tmp_path: Path, name: str, record: Any, why: str) -> None:
    assert re.search(why, problem(tmp_path, name, record))


def test_broken_json_lines_are_problems_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    good, bad, last = read("text", path)
    assert isinstance(good, Record) and isinstance(last, Record)
    assert bad == Problem(f"{path}, line 3", "broken JSON (Expecting value at column 10)")


def test_a_broken_json_list_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "i.json"
    path.write_text('[\n{"conversations": []},\n{"conversations": [}\n]')
    with pytest.raises(DataError, match=r"i.json, line 3: broken JSON \(Expecting value\); correct it"):
        read("instruct", path)


def test_repeated_ids_are_problems_until_renumbered(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [{"id": "a/b", "text": "x"}, {"id": "a/b", "text": "y"}])
    _, bad = read("text", path)
    assert bad == Problem(
        f"{path}, line 2 (key 'a_b')", f"same key as {path}, line 1; make the ids unique, or pass --renumber"
    )
    assert [record.key for record in read("text", path, renumber=True)] == ["00000000", "00000001"]


@pytest.mark.parametrize("content", ["", " \n\n", "[]"])
def test_empty_inputs(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"input .*t.jsonl: (empty|no records in it); give a file with at least one"):
        read("text", path)


def test_missing_and_binary_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input .*none.jsonl: no such file; correct the path"):
        read("text", tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x.jsonl: not UTF-8 text \(.*\); convert it"):
        read("text", tmp_path / "x.jsonl")


def test_a_tokenizer_learns_from_every_text_of_every_format(tmp_path: Path) -> None:
    files = raw_folder(tmp_path)
    assert list(texts_of(files["captions"])) == [" A red bar. ", "Dots and é.", "The same bar again."]
    assert list(texts_of(files["interleaved"])) == ["A title", "First page.", "Second page.", "Only one."]
    assert list(texts_of(files["text"])) == ["Once upon a time.", "The end."]
    assert list(texts_of(files["instruct"]))[:3] == ["\nWhat colour?", "red", "Compare  with ."]
    (tmp_path / "plain.txt").write_text("just\nwords")
    assert list(texts_of(tmp_path / "plain.txt")) == ["just\nwords"]
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: broken JSON .*; correct it"):
        list(texts_of(tmp_path / "bad.jsonl"))
