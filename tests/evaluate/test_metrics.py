"""Scores against their definitions, spelt out."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtrain.evaluate.metrics import binary_metrics, normalise_answer, vqa_score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes.", "yes"),
        ("The  red\nCar", "red car"),
        ("an apple, a pear", "apple pear"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5 metres.", "3.5 metres"),
        ("blue/green", "blue green"),
        ("what?!", "what"),
        ("Don't", "dont"),
        ("dont", "dont"),
        ("", ""),
    ],
)
def test_answers_are_compared_without_what_does_not_matter(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@given(st.integers(0, 10), st.integers(4, 12))
def test_votes_are_scored_by_leaving_one_person_out(votes: int, people: int) -> None:
    votes = min(votes, people)
    answers = ["The cat"] * votes + [f"dog number x{i}" for i in range(people - votes)]
    each = [min(1.0, sum(answer == "The cat" for answer in rest) / 3) for rest in combinations(answers, people - 1)]
    assert vqa_score("cat.", answers) == pytest.approx(sum(each) / people)


def test_ten_votes_give_the_challenge_s_published_steps() -> None:
    given = [round(vqa_score("x", ["x"] * votes + ["y"] * (10 - votes)), 2) for votes in range(6)]
    assert given == [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]


def test_few_answers_are_alternatives() -> None:
    assert vqa_score("Red!", ["red"]) == 1.0
    assert vqa_score("crimson", ["red", "crimson"]) == 1.0
    assert vqa_score("blue", ["red", "crimson", "scarlet"]) == 0.0


def test_binary_metrics_are_those_of_the_four_counts() -> None:
    labels = [True, True, True, False, False, False, False]
    scores = [2.0, 0.5, -1.0, 1.0, -0.5, -2.0, 0.0]
    found = binary_metrics(labels, scores)
    hits, false_alarms, misses = 2, 1, 1
    pairs = [(a > b) + (a == b) / 2 for a in scores[:3] for b in scores[3:]]
    assert found == pytest.approx(
        {
            "accuracy": 5 / 7,
            "precision": hits / (hits + false_alarms),
            "recall": hits / (hits + misses),
            "f1": 2 * hits / (2 * hits + false_alarms + misses),
            "auroc": sum(pairs) / len(pairs),
            "true_labels": 3 / 7,
            "true_answers": 3 / 7,
            "count": 7,
        }
    )


def test_what_is_not_defined_is_left_out() -> None:
    assert "auroc" not in binary_metrics([True, True], [1.0, -1.0])
    assert "precision" not in binary_metrics([True, False], [-1.0, -1.0])
    assert binary_metrics([False, False], [-1.0, -1.0]) == {
        "accuracy": 1.0,
        "true_labels": 0.0,
        "true_answers": 0.0,
        "count": 2.0,
    }
    broken = binary_metrics([True, False], [math.nan, -1.0])
    assert "auroc" not in broken and broken["accuracy"] == 0.5
