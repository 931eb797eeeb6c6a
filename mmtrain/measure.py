"""Held-out measurements inside the loop: loss by source and image-text matching, the same samples every time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from mmtrain.config.schema import Recipe
from mmtrain.data.loader import Loader
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.evaluate.matching import Matching
from mmtrain.model.balance import RouterState
from mmtrain.parallel.engine import Engine
from mmtrain.parallel.groups import Groups
from mmtrain.samples import SampleCount
from mmtrain.totals import LossTotals, StepSums


class Measured(NamedTuple):
    """One measurement."""

    held_out: Mapping[str, float]
    """Language loss by source, and `all`."""
    matching: Mapping[str, float]
    """Accuracy, F1, AUROC ...; empty where the recipe asks for none."""


class HeldOut:
    """Measures what `recipe.eval` names. Every rank does the same number of batches.

    Made before the first step, so that missing shards and files are told before any training. DataError for those.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, groups: Groups) -> None:
        self._recipe, self._tokenizer, self._groups = recipe, tokenizer, groups
        self._matching: Matching | None = None
        if recipe.eval.every > 0:
            if recipe.eval.matching is not None:
                self._matching = Matching(recipe, tokenizer, recipe.eval.matching)
            if recipe.eval.sources:
                self._loader().close()

    def _loader(self) -> Loader:
        """The held-out packs from their beginning, decoded in this process."""
        recipe = replace(self._recipe, data=replace(self._recipe.data, workers=0))
        sources, batches = self._recipe.eval.sources, self._recipe.eval.batches
        place = self._groups.data_rank, self._groups.data_size
        return Loader(recipe, self._tokenizer, *place, sources=sources, finite_batches=batches)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether to measure after `step`."""
        every = self._recipe.eval.every
        return every > 0 and (step % every == 0 or step == total_steps)

    def measure(self, engine: Engine, routers: RouterState) -> Measured:
        """Measure the weights as they are. Collective."""
        held_out = self._losses(engine, routers) if self._recipe.eval.sources else {}
        matching: Mapping[str, float] = {}
        if self._matching is not None:
            inputs = routers.inputs(torch.ones(()), {part: torch.ones(()) for part in routers.shares})
            matching = self._matching.measure(
                lambda batch, at: engine.evaluate(batch.to(self._groups.device), inputs, at.to(self._groups.device)),
                self._groups.data_rank,
                self._groups.data_size,
                self._groups.sum_over_data,
            )
        return Measured(held_out, matching)

    def _losses(self, engine: Engine, routers: RouterState) -> dict[str, float]:
        """Mean language loss over the held-out batches, by source and over all."""
        totals, samples = LossTotals(self._recipe.model), SampleCount(self._recipe.data.max_bad_fraction)
        with self._loader() as loader:
            for step in loader:
                sums = StepSums.of(step, 0, self._groups, len(self._recipe.eval.sources))
                samples.add(sums, step, self._groups)
                inputs = routers.inputs(sums.label_weight, sums.valid_tokens)
                for batch in step.micro_batches:
                    totals.add(engine.evaluate(batch.to(self._groups.device), inputs))
        totals.reduce(self._groups)
        return {**totals.by_source(list(self._recipe.eval.sources)), "all": totals.language_loss()}
