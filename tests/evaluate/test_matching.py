"""Matching: the same scores for any number of data ranks, and errors before any training."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Matching as MatchingConfig
from mmtrain.data.batch import batch_documents
from mmtrain.data.record import Batch
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.evaluate.matching import Matching
from mmtrain.evaluate.metrics import binary_metrics
from mmtrain.evaluate.wording import matching_question
from mmtrain.model.stepio import first_inputs
from tests.data.inputs import tokenizer
from tests.evaluate import checkpoints

RECIPE = checkpoints.recipe()
MODEL = checkpoints.random_model(RECIPE)
INPUTS = first_inputs(RECIPE.model)


@torch.no_grad()
def forward(batch: Batch, at: torch.Tensor) -> torch.Tensor:
    return MODEL(batch, INPUTS, at)


def make(folder: Path, limit: int = 0, wide: int = 4, long: int = 4096) -> Matching:
    """A matching whose batches hold a few prompts."""
    images, data = checkpoints.pictures(folder / "images"), checkpoints.statements(folder)
    recipe = replace(RECIPE, data=replace(RECIPE.data, sequence_length=long, micro_batch=1, max_images=wide))
    return Matching(recipe, tokenizer(), MatchingConfig(str(data), str(images), limit))


def test_scores_are_the_log_odds_of_true_one_statement_at_a_time(tmp_path: Path) -> None:
    matching = make(tmp_path)
    wanted = []
    for statement in matching.statements:
        document = matching.prompter.question(matching_question(statement.statement), statement.image)
        batch = batch_documents([document], RECIPE, tokenizer())
        logits = forward(batch, torch.tensor([batch.tokens.numel() - 1]))[0].log_softmax(-1)
        true, false = (tokenizer().encode(f" {word}")[0] for word in ("true", "false"))
        wanted.append(float(logits[true] - logits[false]))
    assert matching.scores(forward) == pytest.approx(wanted, abs=1e-4)
    labels = [statement.label for statement in matching.statements]
    assert matching.measure(forward, 0, 1, lambda x: x) == pytest.approx(binary_metrics(labels, wanted))


@pytest.mark.parametrize(("ranks", "wide"), [(2, 4), (3, 2), (5, 2), (4, 3)])
def test_data_ranks_share_the_statements_in_as_many_batches_each(tmp_path: Path, ranks: int, wide: int) -> None:
    matching = make(tmp_path, wide=wide)
    assert matching.batch_size == wide
    calls = [0] * ranks

    def counted(rank: int) -> Callable[[Batch, torch.Tensor], torch.Tensor]:
        def inner(batch: Batch, at: torch.Tensor) -> torch.Tensor:
            calls[rank] += 1
            assert 1 <= len(batch.tokens) <= wide
            return forward(batch, at)

        return inner

    parts = [torch.tensor(matching.scores(counted(rank), rank, ranks)) for rank in range(ranks)]
    assert len(set(calls)) == 1
    assert sum(parts).tolist() == pytest.approx(matching.scores(forward), abs=1e-4)
    assert all(sum(part[item] != 0 for part in parts) == 1 for item in range(len(matching.statements)))


def test_a_batch_is_no_larger_than_one_of_training(tmp_path: Path) -> None:
    matching = make(tmp_path, wide=100, long=300)
    documents = [
        matching.prompter.question(question, statement.image)
        for question, statement in zip(matching.questions, matching.statements, strict=True)
    ]
    width = matching.prompter.batch(documents).tokens.shape[1]
    assert matching.batch_size == 300 // width < 7


def test_the_limit_takes_the_first_statements(tmp_path: Path) -> None:
    few = make(tmp_path, limit=3)
    assert few.measure(forward, 0, 1, lambda x: x)["count"] == 3
    assert few.scores(forward) == pytest.approx(make(tmp_path).scores(forward)[:3], abs=1e-4)


def test_errors_come_when_it_is_made(tmp_path: Path) -> None:
    matching = make(tmp_path)
    config = MatchingConfig(str(tmp_path / "none.jsonl"), str(matching.prompter.images), 0)
    with pytest.raises(DataError, match=re.escape(f"evaluation data {tmp_path / 'none.jsonl'}: no such file")):
        Matching(RECIPE, tokenizer(), config)
    (matching.prompter.images / "blue.png").write_bytes(b"\x89PNG broken")
    config = MatchingConfig(str(tmp_path / "matching.jsonl"), str(matching.prompter.images), 0)
    with pytest.raises(DataError, match=r"blue.png: unreadable image: .*; replace the picture or leave it out"):
        Matching(RECIPE, tokenizer(), config)


def test_answers_that_begin_alike_are_refused(tmp_path: Path) -> None:
    fields = json.loads(tokenizer().path.read_text())
    fields["model"]["merges"] = []  # every byte a token: both answers begin with the space
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    checkpoints.pictures(tmp_path / "images")
    config = MatchingConfig(str(checkpoints.statements(tmp_path)), str(tmp_path / "images"), 0)
    with pytest.raises(
        DataError, match=r"'true' and 'false' begin with the same token \d+, so matching cannot compare"
    ):
        Matching(RECIPE, Tokenizer(tmp_path), config)
