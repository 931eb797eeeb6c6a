"""Every way a file of questions can be wrong says where and what."""

import json
import re
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.evaluate.files import image_names, read_captions, read_questions, read_statements
from tests.data.inputs import write_lines
from tests.evaluate import checkpoints


def test_questions_come_in_order_up_to_the_limit(tmp_path: Path) -> None:
    images, data = checkpoints.pictures(tmp_path / "images"), checkpoints.questions(tmp_path)
    everything = read_questions(data, images)
    assert [question.id for question in everything] == [f"q{n}" for n in range(6)]
    assert everything[3].image is None and len(everything[4].answers) == 10
    assert read_questions(data, images, 2) == everything[:2]
    assert image_names(data) == ["red.png", "green.png", "blue.png"]


def test_captions_are_stripped_and_numbered(tmp_path: Path) -> None:
    images, data = checkpoints.pictures(tmp_path / "images"), checkpoints.captions(tmp_path)
    assert [tuple(item) for item in read_captions(data, images, 2)] == [
        ("1", "red.png", "It is red."),
        ("2", "green.png", "It is green now."),
    ]


GOOD = {"id": "a", "image": "red.png", "statement": "it is red", "label": True}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            '{"id": "b", ',
            "line 2: broken JSON (Expecting property name enclosed in double quotes at column 13); correct",
        ),
        ("[1]", "line 2: a list, expected an object with named fields"),
        (json.dumps(GOOD | {"image": "no.png"}), "line 2: image 'no.png' does not exist in {images}; correct the path"),
        (json.dumps(GOOD | {"label": "true"}), "line 2: label is 'true', expected true or false"),
        (json.dumps(GOOD | {"statement": 3}), "line 2: statement is 3, expected a text"),
        (json.dumps({"image": "red.png", "label": True}), "line 2: no field 'statement', found image, label"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: str, message: str) -> None:
    images, data = checkpoints.pictures(tmp_path / "images"), tmp_path / "bad.jsonl"
    data.write_text(json.dumps(GOOD) + "\n" + second + "\n")
    with pytest.raises(DataError, match=re.escape(f"{data}, " + message.format(images=images))):
        read_statements(data, images)
    assert len(read_statements(data, images, 1)) == 1, "lines behind the limit are not read"


@pytest.mark.parametrize("answers", [[], ["yes", 3]])
def test_answers_must_be_texts(tmp_path: Path, answers: list) -> None:
    data = write_lines(tmp_path / "vqa.jsonl", [{"question": "Is it?", "answers": answers}])
    message = f"line 1: answers is {answers!r}, expected a list of texts, not empty"
    with pytest.raises(DataError, match=re.escape(message)):
        read_questions(data, tmp_path)


def test_an_empty_caption_is_refused(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "captions.jsonl", [{"image": "red.png", "caption": "  "}])
    with pytest.raises(DataError, match="line 1: empty caption; leave the line out"):
        read_captions(data, tmp_path)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    with pytest.raises(DataError, match=re.escape(f"evaluation data {data}: no such file; correct the path")):
        read_questions(data, tmp_path)
    data.write_text(" \n")
    with pytest.raises(DataError, match=re.escape(f"evaluation data {data}: empty; give a file with at least one")):
        read_questions(data, tmp_path)
    data.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=re.escape(f"evaluation data {data}: not UTF-8 text (")):
        read_questions(data, tmp_path)


def test_a_negative_limit_is_refused(tmp_path: Path) -> None:
    data = checkpoints.questions(tmp_path)
    with pytest.raises(DataError, match=f"limit -3: give how many lines of {data} to use, or 0 for all"):
        read_questions(data, tmp_path, -3)
