"""Packs' arrays to the tensors of one micro-batch, and documents to a batch without a plan (evaluation, prompts)."""

from collections.abc import Sequence

import numpy as np
import torch

from mmtrain.config.schema import Recipe
from mmtrain.data.collate import PackArrays, Shape, Slot, collate_pack, lay_out
from mmtrain.data.image import Canvas
from mmtrain.data.record import Batch, Document
from mmtrain.data.tokenizer import Tokenizer


def canvas_of(recipe: Recipe) -> Canvas:
    """How the recipe's images become pixels."""
    data = recipe.data
    height, width = recipe.model.vision.image_size
    return Canvas(height, width, data.resize, data.sub_images, data.max_image_pixels)


def stack(packs: Sequence[PackArrays], shape: Shape, num_sources: int) -> Batch:
    """One micro-batch of B packs; a blank image stands in where no pack has any."""
    length, per_image = shape.length, shape.image_tokens

    def rows(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(pack, name) for pack in packs])).to(dtype)

    starts = np.concatenate([pack.starts + number * length for number, pack in enumerate(packs)])
    count = len(starts)
    if count:
        panels = [pack.panels for pack in packs]
        images = torch.from_numpy(panels[0] if len(panels) == 1 else np.concatenate(panels))
        slots = torch.from_numpy(starts[:, None] + np.arange(per_image))
    else:
        images = torch.zeros(1, 3, shape.canvas.height, shape.canvas.width, dtype=torch.uint8)
        slots = torch.full((1, per_image), -1)
    return Batch(
        tokens=rows("tokens", torch.int64),
        labels=rows("labels", torch.int64),
        weights=rows("weights", torch.float32),
        document_ids=rows("document_ids", torch.int64),
        positions=rows("positions", torch.int64),
        kind=rows("kind", torch.uint8),
        source_ids=rows("source_ids", torch.int64),
        images=images,
        image_valid=torch.full((max(count, 1),), count > 0),
        image_slots=slots,
        keys=[pack.keys for pack in packs],
        num_sources=num_sources,
    )


def batch_documents(documents: Sequence[Document], recipe: Recipe, tokenizer: Tokenizer) -> Batch:
    """A batch with one document a row, padded on the right to the longest; every row is source 0 of 1.

    Nothing is cut: a row may be longer than the recipe's packs. BadSample if an image cannot be decoded.
    """
    canvas, per_image = canvas_of(recipe), recipe.model.connector.num_tokens
    laid = [lay_out(document, None, Shape(canvas, per_image, 0), tokenizer.image_id) for document in documents]
    shape = Shape(canvas, per_image, max(len(row.tokens) for row in laid))
    packs = [
        collate_pack([Slot(document.key, 0, len(row.tokens), row)], shape, tokenizer.image_id, tokenizer.pad_id)
        for document, row in zip(documents, laid, strict=True)
    ]
    return stack(packs, shape, num_sources=1)
