"""The order in which a source's documents are drawn, as a function of (seed, epoch): no state but an ordinal.

Every epoch permutes the shards, takes `open_shards` of them at a time as a block, and permutes the samples of each
block. So only a block's shards are read at once, every sample comes once an epoch, and a position is one number:
ordinal = epoch * samples + place in the epoch.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat, starmap
from typing import NamedTuple

import numpy as np

from mmtrain.config.seed import derive
from mmtrain.config.tokens import TokenKind
from mmtrain.data.columns import Columns, Index
from mmtrain.data.image import Canvas
from mmtrain.data.index import Shard
from mmtrain.data.pack import Cut
from mmtrain.data.record import IndexEntry, Segment

OPEN_BLOCKS = 3
"""Blocks that are remembered, with their indexes: the one being drawn and those that waiting documents came from."""


def permutation(count: int, seed: int, *site: str | int) -> np.ndarray:
    """The permutation of range(count) that belongs to `site`: int64, the same for every version of numpy.

    numpy promises a stable stream of raw Philox words, but not of its own shuffles; so sort the words.
    """
    words = np.random.Philox(key=derive(seed, *site)).random_raw(count)
    return np.argsort(words, kind="stable")


class Sizer(NamedTuple):
    """How much room a segment takes in a pack, by the recipe."""

    canvas: Canvas
    """Decides how many panels an image becomes."""
    image_tokens: int
    """Decoder tokens of one panel."""

    def panels(self, segment: Segment) -> int:
        """Canvases that the segment needs: 0 for text."""
        return self.canvas.panels(segment.width, segment.height) if segment.kind == TokenKind.IMAGE else 0

    def tokens(self, segment: Segment) -> int:
        """Positions that the segment takes."""
        return segment.tokens + self.panels(segment) * self.image_tokens

    def rooms(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Positions and panels of every sample, [samples] int64 each; 0 for unusable ones."""
        larger = (columns["segment_width"] > self.canvas.width) | (columns["segment_height"] > self.canvas.height)
        panels = np.where(columns["segment_kind"] == TokenKind.IMAGE, 1 + self.canvas.sub_images * larger, 0)
        tokens = columns["segment_tokens"] + panels * self.image_tokens
        ends = columns["segment_end"]
        usable = ~columns.unusable
        of_tokens, of_panels = (
            np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[ends], prepend=0) * usable
            for values in (tokens, panels)
        )
        return of_tokens, of_panels


class Planned(NamedTuple):
    """One document in drawing order, or a stretch of a long one: what windows hold and packs are made of."""

    ordinal: int
    """Its number in the source's order."""
    source: int
    """Number of the source in the recipe's order."""
    index: str
    """Path of the shard's index."""
    row: int
    """Number of the sample in the shard."""
    tokens: int
    """Positions that it takes, image tokens included; 0 for an unusable sample."""
    panels: int
    """Images (sub-images count) that it brings."""
    part: int = 0
    """Number of the stretch."""
    cut: Cut | None = None
    """The stretch; None for the whole document."""
    withheld: str = ""
    """Why its place stays padding although nothing is wrong with it; empty for a document that is read."""


class Block(NamedTuple):
    """Neighbours in drawing order."""

    first: int
    """Ordinal of the first document."""
    documents: list[Planned]
    """In order."""


class SourceOrder:
    """All documents of one source, for ever, by ordinal."""

    def __init__(
        self,
        name: str,
        number: int,
        shards: Sequence[Shard],
        sizer: Sizer,
        seed: int,
        open_shards: int,
        read: Callable[[str], Index],
    ) -> None:
        """Source `number` of the recipe.

        `shards` in a fixed order; `read` gives an index by its path; at most `open_shards` make a block.
        """
        self.name = name
        self.number = number
        self._shards = shards
        self._sizer = sizer
        self._seed = seed
        self._open_shards = open_shards
        self._read = read
        self.samples = sum(shard.header.samples for shard in shards)
        """Documents of one epoch, unusable ones included."""
        self._epochs: OrderedDict[int, tuple[list[int], list[int]]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._indexes: OrderedDict[str, Index] = OrderedDict()

    def block(self, ordinal: int) -> Block:
        """The block that holds the document at `ordinal` >= 0."""
        epoch, place = divmod(ordinal, self.samples)
        return self._block(epoch, bisect_right(self._epoch(epoch)[1], place) - 1)

    def __getitem__(self, ordinal: int) -> Planned:
        """The document at `ordinal` >= 0."""
        block = self.block(ordinal)
        return block.documents[ordinal - block.first]

    def entry(self, document: Planned) -> IndexEntry:
        """All that the index says about a document."""
        return self._index(document.index).columns.entry(document.row)

    def shard_path(self, document: Planned) -> str:
        """The tar that a document lies in."""
        return self._index(document.index).path

    def identity(self) -> str:
        """Short hash of what the shards hold and how it was tokenised; the folder they lie in does not matter."""
        headers = [shard.header for shard in self._shards]
        lines = [f"{header.samples} {header.members_sha256} {header.tokenizer_hash}" for header in headers]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def total_tokens(self) -> int:
        """Positions of all documents of one epoch; reads every index once, and keeps none."""
        return sum(int(self._sizer.rooms(self._read(shard.index).columns)[0].sum()) for shard in self._shards)

    def _index(self, path: str) -> Index:
        """An index, from memory if it was used lately."""
        if path in self._indexes:
            self._indexes.move_to_end(path)
        else:
            self._indexes[path] = self._read(path)
            if len(self._indexes) > OPEN_BLOCKS * self._open_shards:
                self._indexes.popitem(last=False)
        return self._indexes[path]

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards of an epoch in order, and the place in the epoch at which each block begins."""
        if epoch not in self._epochs:
            order = permutation(len(self._shards), self._seed, "shards", self.name, epoch).tolist()
            sizes = [self._shards[shard].header.samples for shard in order]
            blocks = [sum(sizes[at : at + self._open_shards]) for at in range(0, len(order), self._open_shards)]
            self._epochs[epoch] = order, [0, *accumulate(blocks)][:-1]
            if len(self._epochs) > OPEN_BLOCKS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _block(self, epoch: int, number: int) -> Block:
        """One block of an epoch."""
        if (epoch, number) not in self._blocks:
            order, starts = self._epoch(epoch)
            shards = [self._shards[n] for n in order[number * self._open_shards : (number + 1) * self._open_shards]]
            rooms = [self._sizer.rooms(self._index(shard.index).columns) for shard in shards]
            counts = [len(tokens) for tokens, _ in rooms]
            first, count = epoch * self.samples + starts[number], sum(counts)
            shuffled = permutation(count, self._seed, "samples", self.name, epoch, number)
            columns = [
                np.concatenate([np.arange(count) for count in counts]),
                *(np.concatenate([room[part] for room in rooms]) for part in (0, 1)),
            ]
            paths = [shard.index for shard in shards]
            rows = zip(
                range(first, first + count),
                repeat(self.number),
                map(paths.__getitem__, np.repeat(np.arange(len(paths)), counts)[shuffled].tolist()),
                *(column[shuffled].tolist() for column in columns),
                strict=False,
            )
            self._blocks[epoch, number] = Block(first, list(starmap(Planned, rows)))
            if len(self._blocks) > OPEN_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[epoch, number]
