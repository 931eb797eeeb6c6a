"""From decoded documents to one pack's arrays: labels, weights, document ids, positions, image slots.

numpy only: decoding processes import this module and never torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mmtrain.config.schema import LossWeights
from mmtrain.config.tokens import TokenKind
from mmtrain.data.image import CHANNELS, Canvas, decode_image
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


class Laid(NamedTuple):
    """A document, or a stretch of one, as places in a row of positions."""

    length: int
    """Positions."""
    texts: list[tuple[int, np.ndarray, np.ndarray]]
    """First position, token ids [n] int32, and [n] bool whether each is a target of the loss."""
    images: list[int]
    """First position of each panel."""


class Slot(NamedTuple):
    """What stands at one place of a pack."""

    key: str
    """Sample key."""
    source: int
    """Number of the source."""
    length: int
    """Positions that the plan gave it."""
    laid: Laid | None
    """What lies there; None for a bad sample, whose place stays padding."""


_BY_POSITION = {
    "tokens": np.int64,
    "labels": np.int64,
    "document_ids": np.int64,
    "positions": np.int64,
    "source_ids": np.int64,
    "weights": np.float32,
    "kind": np.uint8,
}
"""Arrays of a pack with one number for each position, the widest numbers first, so that all are aligned."""


@dataclass(frozen=True, slots=True)
class PackArrays:
    """One pack of T positions and k images, in the types that the model reads: nothing is converted later."""

    tokens: np.ndarray
    """[T] int64."""
    labels: np.ndarray
    """[T] int64."""
    document_ids: np.ndarray
    """[T] int64: place in `keys`, -1 for padding."""
    positions: np.ndarray
    """[T] int64."""
    source_ids: np.ndarray
    """[T] int64."""
    weights: np.ndarray
    """[T] float32."""
    kind: np.ndarray
    """[T] uint8."""
    starts: np.ndarray
    """[k] int64: first position of each panel in the pack."""
    panels: np.ndarray
    """[k, 3, H, W] uint8."""
    keys: list[str]
    """Sample keys, bad ones included, so that document ids are places in it."""

    @staticmethod
    def nbytes(shape: Shape, panels: int) -> int:
        """Bytes of a pack with `panels` images."""
        by_position = sum(np.dtype(kind).itemsize for kind in _BY_POSITION.values())
        image = CHANNELS * shape.canvas.height * shape.canvas.width
        return shape.length * by_position + panels * (np.dtype(np.int64).itemsize + image)

    @classmethod
    def within(cls, memory: np.ndarray, shape: Shape, panels: int) -> "PackArrays":
        """Arrays with room for `panels` images that lie in `memory`, uint8 of at least `nbytes` bytes; nothing is set.

        Where each array lies depends on the arguments alone, so that two processes find them in one memory.
        """
        sizes = {"starts": (np.int64, panels)} | {name: (kind, shape.length) for name, kind in _BY_POSITION.items()}
        arrays, at = {}, 0
        for name, (kind, count) in sizes.items():
            arrays[name] = np.frombuffer(memory, kind, count, at)
            at += arrays[name].nbytes
        size = (CHANNELS, shape.canvas.height, shape.canvas.width)
        pixels = np.frombuffer(memory, np.uint8, panels * math.prod(size), at).reshape(panels, *size)
        return cls(**arrays, panels=pixels, keys=[])

    @classmethod
    def fresh(cls, shape: Shape, panels: int) -> "PackArrays":
        """`within` memory of their own."""
        return cls.within(np.empty(cls.nbytes(shape, panels), np.uint8), shape, panels)

    def holding(self, panels: int, keys: list[str]) -> "PackArrays":
        """The same arrays as a finished pack: its first `panels` images, and its keys."""
        return replace(self, starts=self.starts[:panels], panels=self.panels[:panels], keys=keys)


def lay_out(document: Document, cut: Cut | None, shape: Shape, room: np.ndarray) -> Laid:
    """A document's stretch as tokens, its pixels in the first places of `room` [n, 3, H, W].

    BadSample if one of its images cannot be decoded. Pixels that find no room are lost, but have their tokens.
    """
    texts: list[tuple[int, np.ndarray, np.ndarray]] = []
    images: list[int] = []
    length = 0
    parts = document.parts if cut is None else document.parts[cut.first : cut.last + 1]
    for number, part in enumerate(parts):
        if isinstance(part, ImagePart):
            end = length + len(decode_image(part.data, shape.canvas, room[len(images) :])) * shape.image_tokens
            images.extend(range(length, end, shape.image_tokens))
            length = end
        else:
            start = cut.start if cut and number == 0 else 0
            stop = cut.stop if cut and number == len(parts) - 1 else len(part.token_ids)
            texts.append((length, part.token_ids[start:stop], part.supervised[start:stop]))
            length += stop - start
    return Laid(length, texts, images)


EVEN = LossWeights()


def collate_pack(
    slots: Sequence[Slot],
    arrays: PackArrays,
    shape: Shape,
    image_id: int,
    pad_id: int,
    loss_weights: LossWeights = EVEN,
) -> PackArrays:
    """One pack from what stands at its places, in order. A bad sample's place is padding of the same length.

    `arrays` hold the pixels of all good slots already, one after another; everything else is written here.
    """
    lengths = np.array([slot.length for slot in slots], np.int64)
    ends = lengths.cumsum()
    begins = ends - lengths
    used = int(lengths.sum())
    tokens, learnt = arrays.tokens, np.zeros(shape.length, bool)
    tokens[:] = pad_id
    starts: list[int] = []
    for slot, begin in zip(slots, begins.tolist(), strict=True):
        if slot.laid is not None:
            for start, ids, supervised in slot.laid.texts:
                at = begin + start
                tokens[at : at + len(ids)] = ids
                learnt[at : at + len(ids)] = supervised
            starts += [begin + start for start in slot.laid.images]
    good = np.array([slot.laid is not None for slot in slots], bool).repeat(lengths)
    number = np.arange(len(slots)).repeat(lengths)
    rest = slice(used, None)
    arrays.document_ids[:used] = np.where(good, number, -1)
    arrays.document_ids[rest] = -1
    arrays.positions[:used] = (np.arange(used) - begins[number]) * good
    arrays.positions[rest] = 0
    arrays.source_ids[:used] = np.array([slot.source for slot in slots], np.int64)[number] * good
    arrays.source_ids[rest] = 0
    arrays.kind[:used] = good * np.uint8(TokenKind.TEXT)
    arrays.kind[rest] = TokenKind.PADDING
    images = (np.array(starts, np.int64)[:, None] + np.arange(shape.image_tokens)).ravel()
    tokens[images] = image_id
    arrays.kind[images] = TokenKind.IMAGE
    arrays.starts[: len(starts)] = starts
    # What stands at t predicts t + 1, inside the document only, and from images up to t.
    learnt[:-1] = learnt[1:]
    learnt[ends - 1] = False
    if loss_weights.after_image == loss_weights.text_only:
        np.multiply(learnt, loss_weights.text_only, out=arrays.weights)
    else:
        before = np.concatenate([[0], (arrays.kind[:used] == TokenKind.IMAGE).cumsum()])
        seen = before[1:] > before[begins][number]
        arrays.weights[:used] = learnt[:used] * np.where(seen, loss_weights.after_image, loss_weights.text_only)
        arrays.weights[rest] = 0
    np.multiply(tokens[1:], arrays.weights[:-1] > 0, out=arrays.labels[:-1])
    arrays.labels[-1] = 0
    return arrays.holding(len(starts), [slot.key for slot in slots])
