"""The evaluations of a checkpoint: question answering, image-text matching, captions. Each reads its file and asks."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch.nn.functional as F

from mmtrain.config.schema import Matching as MatchingConfig
from mmtrain.data.record import Document, ImagePart
from mmtrain.evaluate.files import read_captions, read_questions
from mmtrain.evaluate.generate import CachedForward, generate
from mmtrain.evaluate.matching import Matching
from mmtrain.evaluate.metrics import binary_metrics, normalise_answer, vqa_score
from mmtrain.evaluate.prompts import Prompter, neighbours
from mmtrain.evaluate.wording import ANSWERS, MATCHING

RIGHT = 0.5
"""Score from which an answer counts as correct in the list of items; the accuracy is the mean score itself."""

Progress = Callable[[Sequence[list[int]]], Iterable[list[int]]]
"""Shows how far a loop over batches is."""


class Outcome(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    """Numbers over all items."""
    items: list[dict[str, Any]]
    """Every item in the file's order: id, image, prompt, output, answer, correct, and score or loss."""
    wording: str
    """What was asked, before the chat template."""
    example: str
    """The whole first prompt, with <image> for all tokens of an image."""


@dataclass(frozen=True)
class Evaluator:
    """Puts a file's items to a model, batch by batch."""

    prompter: Prompter
    forward: CachedForward
    batch_size: int = 64
    max_new_tokens: int = 16
    progress: Progress = list

    def vqa(self, data: Path, limit: int = 0) -> Outcome:
        """Open questions: accuracy by the rule of the VQA challenge."""
        asked = read_questions(data, self.prompter.images, limit)
        outputs = [""] * len(asked)

        def prompt(item: int) -> Document:
            return self.prompter.question(asked[item].question, asked[item].image, asked[item].id)

        for chunk in self._chunks([(question.image, len(question.question)) for question in asked]):
            for item, text in zip(chunk, self._continue([prompt(item) for item in chunk]), strict=True):
                outputs[item] = text
        scores = [vqa_score(output, question.answers) for output, question in zip(outputs, asked, strict=True)]
        answers = [Counter(question.answers).most_common(1)[0][0] for question in asked]
        items = [
            _item(question.id, question.image, question.question, output, answer, score >= RIGHT, score=score)
            for question, output, answer, score in zip(asked, outputs, answers, scores, strict=True)
        ]
        metrics = {"accuracy": fmean(scores), "count": len(asked)}
        for name, wanted in (("yes_no", True), ("other", False)):
            kind = [
                score
                for score, answer in zip(scores, answers, strict=True)
                if (normalise_answer(answer) in ("yes", "no")) == wanted
            ]
            metrics |= {f"accuracy_{name}": fmean(kind), f"count_{name}": len(kind)} if kind else {}
        return Outcome(metrics, items, "{question}", self._text(prompt(0)))

    def matching(self, data: Path, limit: int = 0) -> Outcome:
        """Is the statement true of the image? By P(true) against P(false)."""
        config = MatchingConfig(str(data), str(self.prompter.images), limit)
        matching = Matching(self.prompter.recipe, self.prompter.tokenizer, config, self.prompter.blank)
        matching.batch_size = self.batch_size
        scores = matching.scores(lambda batch, at: self.forward(batch, at, None))
        labels = [statement.label for statement in matching.statements]
        items = [
            _item(
                statement.id,
                statement.image,
                question,
                ANSWERS[score > 0],
                ANSWERS[statement.label],
                (score > 0) == statement.label,
                score=score,
            )
            for statement, question, score in zip(matching.statements, matching.questions, scores, strict=True)
        ]
        example = self.prompter.question(matching.questions[0], matching.statements[0].image)
        return Outcome(binary_metrics(labels, scores), items, MATCHING, self._text(example))

    def caption(self, data: Path, limit: int = 0) -> Outcome:
        """Captions: mean loss of their tokens (nats), and how many are generated word for word."""
        asked = read_captions(data, self.prompter.images, limit)
        outputs, losses = [""] * len(asked), [(0.0, 0)] * len(asked)
        for chunk in self._chunks([(caption.image, len(caption.caption)) for caption in asked]):
            documents = [
                self.prompter.caption(asked[item].caption, asked[item].image, asked[item].id) for item in chunk
            ]
            batch = self.prompter.batch(documents)
            at = batch.weights.flatten().nonzero().squeeze(1)
            logits = self.forward(batch, at, None).float().cpu()
            each = F.cross_entropy(logits, batch.labels.flatten()[at], reduction="none")
            rows = at // batch.tokens.shape[1]
            prompts = [replace(document, parts=document.parts[:1]) for document in documents]
            for row, (item, text) in enumerate(zip(chunk, self._continue(prompts), strict=True)):
                own = each[rows == row]
                outputs[item], losses[item] = text, (float(own.sum()), len(own))
        items = [
            _item(caption.id, caption.image, "", output, caption.caption, output == caption.caption, loss=total / count)
            for caption, output, (total, count) in zip(asked, outputs, losses, strict=True)
        ]
        tokens = sum(count for _, count in losses)
        metrics = {
            "loss": sum(total for total, _ in losses) / tokens,
            "exact_match": fmean(item["correct"] for item in items),
            "tokens": tokens,
            "count": len(asked),
        }
        return Outcome(metrics, items, "", "<image>")

    def answer(self, text: str, image: str | None) -> str:
        """The answer to one question."""
        return self._continue([self.prompter.question(text, image)])[0]

    def _chunks(self, items: Sequence[tuple[str | None, int]]) -> Iterable[list[int]]:
        """Item numbers by batch, from (image, length) of every item."""
        order = neighbours(len(items), lambda item: items[item][0], lambda item: items[item][1])
        return self.progress(
            [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        )

    def _continue(self, prompts: Sequence[Document]) -> list[str]:
        """What the model writes after each prompt."""
        tokenizer, layers = self.prompter.tokenizer, self.prompter.recipe.model.decoder.num_layers
        batch = self.prompter.batch(prompts)
        rows = generate(self.forward, batch, layers, tokenizer.end_ids(), self.max_new_tokens)
        return [tokenizer.decode(row).strip() for row in rows]

    def _text(self, document: Document) -> str:
        """A prompt in words."""
        decode = self.prompter.tokenizer.decode
        return "".join(
            "<image>" if isinstance(part, ImagePart) else decode(part.token_ids, skip_special=False)
            for part in document.parts
        )


def _item(
    name: str, image: str | None, prompt: str, output: str, answer: str, correct: bool, **number: float
) -> dict[str, Any]:
    """One item of the report."""
    return {
        "id": name,
        "image": image,
        "prompt": prompt,
        "output": output,
        "answer": answer,
        "correct": correct,
        **{key: round(value, 6) for key, value in number.items()},
    }
