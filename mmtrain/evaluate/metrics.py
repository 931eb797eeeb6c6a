"""Scores of answers, statements and captions."""

import math
import re
from collections.abc import Sequence

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

FEW_ANSWERS = 3
"""Up to so many answers of a question are alternatives; more are annotators' votes."""


def normalise_answer(text: str) -> str:
    """An answer as the VQA challenge compares it: lower case, no articles or punctuation, numbers as digits.

    After its vqaEval.py; where that mends missing apostrophes from a table ("dont"), all apostrophes go here.
    """
    text = " ".join(text.lower().split())
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text.replace("'", "")
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_edge or number else " ")
    words = _PERIOD.sub("", out).split()
    return " ".join(_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(output: str, answers: Sequence[str]) -> float:
    """How right `output` is, 0 to 1, after normalisation.

    answers  up to 3: alternatives, 1.0 if it is one of them. More: votes of as many people (VQA v2: 10); the mean, over
             leaving out each of them, of min(1, votes of the others for `output` / 3).
    """
    given = normalise_answer(output)
    votes = [normalise_answer(answer) == given for answer in answers]
    if len(answers) <= FEW_ANSWERS:
        return float(any(votes))
    count = sum(votes)
    return sum(min(1.0, (count - vote) / 3) for vote in votes) / len(votes)


def binary_metrics(labels: Sequence[bool], scores: Sequence[float]) -> dict[str, float]:
    """Metrics of "true where score > 0"; `count` items, and the share of true labels and of answers "true".

    What is not defined is left out: precision where nothing was called true, recall where nothing is true, AUROC where
    all labels are equal. A score that is not a number counts as "false" and leaves out AUROC.
    """
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score  # takes seconds

    called = [score > 0 for score in scores]
    out = {
        "accuracy": accuracy_score(labels, called),
        "precision": precision_score(labels, called, zero_division=math.nan),
        "recall": recall_score(labels, called, zero_division=math.nan),
        "f1": f1_score(labels, called, zero_division=math.nan),
    }
    if len(set(labels)) == 2 and all(map(math.isfinite, scores)):
        out["auroc"] = roc_auc_score(labels, scores)
    out |= {"true_labels": sum(labels) / len(labels), "true_answers": sum(called) / len(called)}
    return {name: float(value) for name, value in out.items() if math.isfinite(value)} | {"count": len(labels)}
