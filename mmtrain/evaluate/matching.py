"""Image-text matching: does the model put more probability on "true" than on "false" as the answer's first token?"""

from collections.abc import Callable
from pathlib import Path

import torch

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Matching as MatchingConfig
from mmtrain.config.schema import Recipe
from mmtrain.data.record import Batch
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.evaluate.files import read_statements
from mmtrain.evaluate.metrics import binary_metrics
from mmtrain.evaluate.prompts import Prompter, last_positions, neighbours
from mmtrain.evaluate.wording import ANSWERS, matching_question

Forward = Callable[[Batch, torch.Tensor], torch.Tensor]
"""(batch, logits_at [n] flat indices into B * T) -> logits [n, V]."""

Sum = Callable[[torch.Tensor], torch.Tensor]
"""A tensor -> its sum over the data ranks."""


class Matching:
    """Statements about images, read and checked once, asked as often as wanted."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, config: MatchingConfig, blank: bool = False) -> None:
        """DataError: file, line or picture that cannot be used, or answers that begin with the same token."""
        self.prompter = Prompter(recipe, tokenizer, Path(config.images), blank)
        self.statements = read_statements(Path(config.data), self.prompter.images, config.limit)
        self.prompter.check([statement.image for statement in self.statements])
        self.questions = [matching_question(statement.statement) for statement in self.statements]
        self._answers = [self.prompter.answer_token(ANSWERS[label]) for label in (True, False)]
        if self._answers[0] == self._answers[1]:
            raise DataError(
                f"tokenizer {tokenizer.path}: {ANSWERS[True]!r} and {ANSWERS[False]!r} begin with the same token "
                f"{self._answers[0]}, so matching cannot compare them; train a tokenizer that tells them apart"
            )
        self._order = neighbours(
            len(self.statements), lambda i: self.statements[i].image, lambda i: len(self.questions[i])
        )
        self.batch_size = self._prompts_of_a_micro_batch()

    def _prompts_of_a_micro_batch(self) -> int:
        """Prompts that need no more tokens and images than a training micro-batch."""
        data = self.prompter.recipe.data
        prompts = (self.prompter.question(question, None) for question in self.questions)
        longest = max(sum(len(part.token_ids) for part in prompt.parts) for prompt in prompts)
        tokens = data.micro_batch * data.sequence_length // (longest + self.prompter.image_tokens)
        return max(1, min(tokens, data.micro_batch * data.max_images // (1 + data.sub_images)))

    def scores(self, forward: Forward, data_rank: int = 0, data_size: int = 1, total: Sum = lambda x: x) -> list[float]:
        """log P(true) - log P(false) of every statement. Collective: every data rank runs as many batches.

        A rank whose share of the last batch is empty asks a statement whose answer does not count.
        """
        step = self.batch_size * data_size
        out: torch.Tensor | None = None
        for start in range(0, len(self._order), step):
            mine = self._order[start : start + step][data_rank::data_size]
            documents = [
                self.prompter.question(self.questions[item], self.statements[item].image, self.statements[item].id)
                for item in mine or self._order[:1]
            ]
            batch = self.prompter.batch(documents)
            logits = forward(batch, last_positions(batch)).double()
            if out is None:
                out = torch.zeros(len(self._order), dtype=torch.float64, device=logits.device)
            difference = logits[:, self._answers[0]] - logits[:, self._answers[1]]
            out[mine] = difference[: len(mine)]
        return total(out).tolist()

    def measure(self, forward: Forward, data_rank: int, data_size: int, sum_over_data: Sum) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and AUROC over all statements, the same on every rank."""
        scores = self.scores(forward, data_rank, data_size, sum_over_data)
        return binary_metrics([statement.label for statement in self.statements], scores)
