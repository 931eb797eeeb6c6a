"""The order in which a source's documents are drawn, as a function of (seed, epoch): no state but an ordinal.

Every epoch permutes the shards, takes `open_shards` of them at a time as a block, and permutes the samples of each
block. So only a block's shards are read at once, every sample comes once an epoch, and a position is one number:
ordinal = epoch * samples + place in the epoch.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, repeat
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from mmtrain.config.schema import Data
from mmtrain.config.seed import derive
from mmtrain.config.tokens import TokenKind
from mmtrain.data.columns import Columns, Index
from mmtrain.data.image import Canvas
from mmtrain.data.index import Shard
from mmtrain.data.pack import Cut, cut_document
from mmtrain.data.record import IndexEntry

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

    def segments(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Positions and panels of every segment, [segments] int64 each; panels are 0 for text."""
        larger = (columns["segment_width"] > self.canvas.width) | (columns["segment_height"] > self.canvas.height)
        panels = np.where(columns["segment_kind"] == TokenKind.IMAGE, 1 + self.canvas.sub_images * larger, 0)
        return columns["segment_tokens"] + panels * self.image_tokens, panels

    def rooms(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """Positions and panels of every sample, [samples] int64 each; 0 for unusable ones."""
        ends = columns["segment_end"]
        usable = ~columns.unusable
        of_tokens, of_panels = (
            np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[ends], prepend=0) * usable
            for values in self.segments(columns)
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
    """Neighbours in drawing order: documents, and stretches of those that are longer than a pack."""

    first: int
    """Ordinal of the first document."""
    stop: int
    """Ordinal after the last one."""
    documents: list[Planned]
    """In order; unusable ones have no tokens."""
    tokens: list[int]
    """Of each of them."""
    panels: list[int]
    """Of each of them."""
    volumes: list[int]
    """Sum of tokens * max_images + panels * sequence_length of those before each of them; one more for the end."""
    unusable: list[int]
    """Places of the unusable ones, and the end."""

    def place(self, ordinal: int, part: int = 0) -> int:
        """Where a stretch of the document at `ordinal` stands; the end if that is the next block's."""
        if len(self.documents) == self.stop - self.first:
            return ordinal - self.first
        return bisect_left(self.documents, ordinal, key=attrgetter("ordinal")) + part


class SourceOrder:
    """All documents of one source, for ever, by ordinal."""

    def __init__(
        self,
        name: str,
        number: int,
        shards: Sequence[Shard],
        sizer: Sizer,
        seed: int,
        data: Data,
        read: Callable[[str], Index],
    ) -> None:
        """Source `number` of the recipe, cut to the packs of `data`.

        `shards` in a fixed order; `read` gives an index by its path; at most `data.open_shards` make a block.
        """
        self.name = name
        self.number = number
        self._shards = shards
        self._sizer = sizer
        self._seed = seed
        self._open_shards = data.open_shards
        self._limits = data.sequence_length, data.max_images
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

    def document(self, ordinal: int, part: int = 0) -> Planned:
        """The document at `ordinal` >= 0, or a stretch of it if it is longer than a pack."""
        block = self.block(ordinal)
        return block.documents[block.place(ordinal, part)]

    def entry(self, document: Planned) -> IndexEntry:
        """All that the index says about a document."""
        return self._index(document.index).columns.entry(document.row)

    def shard_path(self, document: Planned) -> str:
        """The tar that a document lies in."""
        return self._index(document.index).path

    def blocks(self, ordinal: int) -> Iterator[tuple[int, list[Shard]]]:
        """First ordinal and shards of the block that holds `ordinal`, and of all after it; reads no index."""
        epoch, place = divmod(ordinal, self.samples)
        number = bisect_right(self._epoch(epoch)[1], place) - 1
        while True:
            order, starts = self._epoch(epoch)
            for at in range(number, len(starts)):
                yield epoch * self.samples + starts[at], self._shards_of(order, at)
            epoch, number = epoch + 1, 0

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
            shards = self._shards_of(order, number)
            rooms = [self._sizer.rooms(self._index(shard.index).columns) for shard in shards]
            counts = [len(tokens) for tokens, _ in rooms]
            first, count = epoch * self.samples + starts[number], sum(counts)
            shuffled = permutation(count, self._seed, "samples", self.name, epoch, number)
            rows, tokens, panels = (
                column[shuffled]
                for column in (
                    np.concatenate([np.arange(count) for count in counts]),
                    *(np.concatenate([room[part] for room in rooms]) for part in (0, 1)),
                )
            )
            paths = [shard.index for shard in shards]
            columns = zip(
                range(first, first + count),
                repeat(self.number),
                map(paths.__getitem__, np.repeat(np.arange(len(paths)), counts)[shuffled].tolist()),
                rows.tolist(),
                tokens.tolist(),
                panels.tolist(),
                repeat(0),
                repeat(None),
                repeat(""),
                strict=False,
            )
            # Planned(...) for each row, made in C: this is half of the time that a block takes.
            documents = list(map(tuple.__new__, repeat(Planned), columns))
            long = np.flatnonzero((tokens > self._limits[0]) | (panels > self._limits[1]))
            if len(long):
                self._cut(documents, long.tolist())
                tokens = np.array([document.tokens for document in documents])
                panels = np.array([document.panels for document in documents])
            volumes = np.cumsum(tokens * self._limits[1] + panels * self._limits[0]).tolist()
            unusable = np.flatnonzero(tokens == 0).tolist()
            sizes = tokens.tolist(), panels.tolist(), [0, *volumes], [*unusable, len(documents)]
            self._blocks[epoch, number] = Block(first, first + count, documents, *sizes)
            if len(self._blocks) > OPEN_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[epoch, number]

    def _shards_of(self, order: Sequence[int], number: int) -> list[Shard]:
        """The shards of a block."""
        return [self._shards[shard] for shard in order[number * self._open_shards : (number + 1) * self._open_shards]]

    def _cut(self, documents: list[Planned], long: Sequence[int]) -> None:
        """Put stretches in the places of the documents that are longer than a pack."""
        sizes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for place in reversed(long):
            document = documents[place]
            path, row = document.index, document.row
            if path not in sizes:
                columns = self._index(path).columns
                sizes[path] = *self._sizer.segments(columns), columns["segment_end"]
            tokens, panels, ends = sizes[path]
            own = slice(ends[row - 1] if row else 0, ends[row])
            segments = list(zip(tokens[own].tolist(), panels[own].tolist(), strict=True))
            cuts = cut_document(segments, *self._limits)
            documents[place : place + 1] = [
                Planned(document.ordinal, self.number, path, row, cut.tokens, cut.panels, part, cut)
                for part, cut in enumerate(cuts)
            ]
