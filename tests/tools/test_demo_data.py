"""What the demo trains on and measures with, from easy-VQA's own questions."""

import random
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.evaluate.wording import ANSWERS, matching_question
from tools import demo_data

QUESTIONS = [
    ("what is the color of the shape?", "blue"),
    ("is there a circle?", "yes"),
    ("is there not a red shape?", "yes"),
    ("what shape is in the image?", "circle"),
]


def test_an_image_s_questions_tell_what_it_shows() -> None:
    assert demo_data.attributes(QUESTIONS) == ("blue", "circle")
    assert demo_data.described(QUESTIONS[:1]) == "blue shape"


def test_every_conversation_is_followed_by_a_statement_with_the_right_answer() -> None:
    images = {f"train/{number:04d}.png": QUESTIONS for number in range(40)}
    records = demo_data.conversations(images, random.Random(0))
    assert [record["id"] for record in records[:2]] == ["train-0000", "train-0000-statement"]
    assert len(records) == 80 and all(record["image"] in images for record in records)
    asked = {turn["value"].removeprefix("<image>\n") for turn in records[0]["conversations"][::2]}
    assert asked == {question for question, _ in QUESTIONS}
    truth = matching_question("a blue circle.")
    answers = []
    for record in records[1::2]:
        question, answer = (turn["value"] for turn in record["conversations"])
        answers.append(answer)
        assert question.startswith("<image>\n")
        assert answer == ANSWERS[question.removeprefix("<image>\n") == truth]
    assert {answers.count("true"), answers.count("false")} != {0, 40}


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(DataError, match=f"output {tmp_path}: exists already; choose another folder or delete it"):
        demo_data.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
