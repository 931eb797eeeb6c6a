"""Packs' arrays to the tensors of one micro-batch, and documents to a batch without a plan (evaluation, prompts)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mmtrain.config.schema import Recipe
from mmtrain.data.collate import PackArrays, Shape, Slot, collate_pack, lay_out
from mmtrain.data.image import CHANNELS, Canvas
from mmtrain.data.record import Batch, Document, ImagePart
from mmtrain.data.tokenizer import Tokenizer


def canvas_of(recipe: Recipe) -> Canvas:
    """How the recipe's images become pixels."""
    data = recipe.data
    height, width = recipe.model.vision.image_size
    return Canvas(height, width, data.resize, data.sub_images, data.max_image_pixels)


def stack(packs: Sequence[PackArrays], shape: Shape, num_sources: int) -> Batch:
    """One micro-batch of B packs; a blank image stands in where no pack has any."""
    length, per_image = shape.length, shape.image_tokens

    def rows(name: str) -> torch.Tensor:
        return _joined([getattr(pack, name)[None] for pack in packs])

    starts = np.concatenate([pack.starts + number * length for number, pack in enumerate(packs)])
    count = len(starts)
    if count:
        images = _joined([pack.panels for pack in packs])
        slots = torch.from_numpy(starts[:, None] + np.arange(per_image))
    else:
        images = torch.zeros(1, CHANNELS, shape.canvas.height, shape.canvas.width, dtype=torch.uint8)
        slots = torch.full((1, per_image), -1)
    return Batch(
        tokens=rows("tokens"),
        labels=rows("labels"),
        weights=rows("weights"),
        document_ids=rows("document_ids"),
        positions=rows("positions"),
        kind=rows("kind"),
        source_ids=rows("source_ids"),
        images=images,
        image_valid=torch.full((max(count, 1),), count > 0),
        image_slots=slots,
        keys=[pack.keys for pack in packs],
        num_sources=num_sources,
    )


def _joined(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """The arrays one after another; a single one is not copied."""
    return torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))


def batch_documents(documents: Sequence[Document], recipe: Recipe, tokenizer: Tokenizer) -> Batch:
    """A batch with one document a row, padded on the right to the longest; every row is source 0 of 1.

    Nothing is cut: a row may be longer than the recipe's packs. BadSample if an image cannot be decoded.
    """
    canvas, per_image = canvas_of(recipe), recipe.model.connector.num_tokens
    rooms, laid = [], []
    for document in documents:
        most = (1 + canvas.sub_images) * sum(isinstance(part, ImagePart) for part in document.parts)
        rooms.append(np.empty((most, CHANNELS, canvas.height, canvas.width), np.uint8))
        laid.append(lay_out(document, None, Shape(canvas, per_image, 0), rooms[-1]))
    shape = Shape(canvas, per_image, max(row.length for row in laid))
    packs = []
    for document, room, row in zip(documents, rooms, laid, strict=True):
        arrays = replace(PackArrays.fresh(shape, len(room)), panels=room)
        slot = Slot(document.key, 0, row.length, row)
        packs.append(collate_pack([slot], arrays, shape, tokenizer.image_id, tokenizer.pad_id))
    return stack(packs, shape, num_sources=1)
