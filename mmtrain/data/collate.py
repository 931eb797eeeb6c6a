"""From decoded documents to one pack's arrays: labels, weights, document ids, positions, image slots.

numpy only: decoding processes import this module and never torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmtrain.config.schema import LossWeights
from mmtrain.config.tokens import TokenKind
from mmtrain.data.image import Canvas, decode_image
from mmtrain.data.pack import Cut
from mmtrain.data.record import Document, ImagePart


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that a recipe's packs have."""

    canvas: Canvas
    """What images become."""
    image_tokens: int
    """Decoder tokens of one panel (M)."""
    length: int
    """Positions of a pack (T)."""


@dataclass(frozen=True, slots=True)
class Laid:
    """A document, or a stretch of one, as a row of tokens."""

    tokens: np.ndarray
    """[n] int32; the placeholder's id at image positions."""
    supervised: np.ndarray
    """[n] bool: whether the token is a target of the loss."""
    panels: list[np.ndarray]
    """[k, 3, H, W] uint8 of each image."""
    starts: list[int]
    """First position of each panel, within the row."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What stands at one place of a pack."""

    key: str
    """Sample key."""
    source: int
    """Number of the source."""
    length: int
    """Positions that the plan gave it."""
    laid: Laid | None
    """Its row; None for a bad sample, whose place stays padding."""


@dataclass(frozen=True, slots=True)
class PackArrays:
    """One pack of T positions. Dtypes are small because packs travel between processes."""

    tokens: np.ndarray
    """[T] int32."""
    labels: np.ndarray
    """[T] int32."""
    weights: np.ndarray
    """[T] float32."""
    document_ids: np.ndarray
    """[T] int32: place in `keys`, -1 for padding."""
    positions: np.ndarray
    """[T] int32."""
    kind: np.ndarray
    """[T] uint8."""
    source_ids: np.ndarray
    """[T] int32."""
    panels: np.ndarray
    """[k, 3, H, W] uint8."""
    starts: np.ndarray
    """[k] int64: first position of each panel in the pack."""
    keys: list[str]
    """Sample keys, bad ones included, so that document ids are places in it."""


def lay_out(document: Document, cut: Cut | None, shape: Shape, image_id: int) -> Laid:
    """A document's stretch as tokens and pixels; BadSample if one of its images cannot be decoded."""
    rows: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    panels: list[np.ndarray] = []
    starts: list[int] = []
    length = 0
    numbers = range(len(document.parts)) if cut is None else range(cut.first, cut.last + 1)
    for number in numbers:
        part = document.parts[number]
        if isinstance(part, ImagePart):
            pixels = decode_image(part.data, shape.canvas)
            count = len(pixels) * shape.image_tokens
            starts.extend(range(length, length + count, shape.image_tokens))
            panels.append(pixels)
            row, mask = np.full(count, image_id, np.int32), np.zeros(count, bool)
        else:
            start = cut.start if cut and number == cut.first else 0
            stop = cut.stop if cut and number == cut.last else len(part.token_ids)
            row, mask = part.token_ids[start:stop], part.supervised[start:stop]
        rows.append(row)
        masks.append(mask)
        length += len(row)
    return Laid(np.concatenate(rows), np.concatenate(masks), panels, starts)


EVEN = LossWeights()


def collate_pack(
    slots: Sequence[Slot], shape: Shape, image_id: int, pad_id: int, loss_weights: LossWeights = EVEN
) -> PackArrays:
    """One pack from what stands at its places, in order. A bad sample's place is padding of the same length."""
    length = shape.length
    tokens = np.full(length, pad_id, np.int32)
    labels = np.zeros(length, np.int32)
    weights = np.zeros(length, np.float32)
    document_ids = np.full(length, -1, np.int32)
    positions = np.zeros(length, np.int32)
    kind = np.full(length, TokenKind.PADDING, np.uint8)
    source_ids = np.zeros(length, np.int32)
    panels: list[np.ndarray] = []
    starts: list[int] = []
    begin = 0
    for number, slot in enumerate(slots):
        end = begin + slot.length
        if slot.laid is not None:
            row, mask = slot.laid.tokens, slot.laid.supervised
            tokens[begin:end] = row
            document_ids[begin:end] = number
            positions[begin:end] = np.arange(slot.length)
            kind[begin:end] = TokenKind.TEXT
            for start in slot.laid.starts:
                kind[begin + start : begin + start + shape.image_tokens] = TokenKind.IMAGE
                starts.append(begin + start)
            # What stands at t predicts t + 1, inside the document only, and from images up to t.
            seen = np.logical_or.accumulate(kind[begin : end - 1] == TokenKind.IMAGE)
            weights[begin : end - 1] = mask[1:] * np.where(seen, loss_weights.after_image, loss_weights.text_only)
            labels[begin : end - 1] = np.where(weights[begin : end - 1] > 0, row[1:], 0)
            source_ids[begin:end] = slot.source
            panels += slot.laid.panels
        begin = end
    pixels = np.concatenate(panels) if starts else np.empty((0, 3, shape.canvas.height, shape.canvas.width), np.uint8)
    keys = [slot.key for slot in slots]
    where = np.array(starts, np.int64)
    return PackArrays(tokens, labels, weights, document_ids, positions, kind, source_ids, pixels, where, keys)
