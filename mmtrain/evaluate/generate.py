"""Batched greedy generation with a cache of keys and values."""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from mmtrain.config.tokens import TokenKind
from mmtrain.data.record import Batch
from mmtrain.evaluate.prompts import last_positions
from mmtrain.model.attention import KVCache

CachedForward = Callable[[Batch, torch.Tensor, KVCache | None], torch.Tensor]
"""(batch, logits_at [n] flat indices into B * T, cache) -> logits [n, V]; the batch is on the CPU."""


def generate(
    forward: CachedForward, prompts: Batch, num_layers: int, end_ids: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The most probable continuation of every row, token by token, up to an end token (left out) or `max_new_tokens`.

    prompts     one document a row, padded on either side
    num_layers  of the decoder
    """
    rows, width = prompts.tokens.shape
    cache = KVCache(num_layers, width + max_new_tokens)
    at = last_positions(prompts)
    positions, documents = (field.flatten()[at].unsqueeze(1) for field in (prompts.positions, prompts.document_ids))
    out: list[list[int]] = [[] for _ in range(rows)]
    unfinished = set(range(rows))
    batch = prompts
    for step in range(1, max_new_tokens + 1):
        chosen = forward(batch, at, cache).argmax(-1).cpu()
        for row, token in enumerate(chosen.tolist()):
            if row in unfinished and token in end_ids:
                unfinished.remove(row)
            elif row in unfinished:
                out[row].append(token)
        if not unfinished or step == max_new_tokens:
            break
        batch, at = _next(batch, chosen.unsqueeze(1), positions + step, documents), torch.arange(rows)
    return out


def _next(batch: Batch, tokens: torch.Tensor, positions: torch.Tensor, documents: torch.Tensor) -> Batch:
    """The batch of one new token a row, [B, 1]; no images, no labels. Finished rows go on, unread."""
    return replace(
        batch,
        tokens=tokens,
        labels=torch.zeros_like(tokens),
        weights=torch.zeros(tokens.shape),
        document_ids=documents,
        positions=positions,
        kind=torch.full(tokens.shape, int(TokenKind.TEXT), dtype=torch.uint8),
        source_ids=torch.zeros_like(tokens),
        images=batch.images[:0],
        image_valid=batch.image_valid[:0],
        image_slots=batch.image_slots[:0],
    )
