"""The order in which a source's documents are drawn, as a function of (seed, epoch): no state but an ordinal.

Every epoch permutes the shards, takes `open_shards` of them at a time as a block, and permutes the samples of each
block. So only a block's shards are read at once, every sample comes once an epoch, and a position is one number:
ordinal = epoch * samples + place in the epoch.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from mmtrain.config.seed import derive
from mmtrain.config.tokens import TokenKind
from mmtrain.data.image import Canvas
from mmtrain.data.index import Shard
from mmtrain.data.record import Index, IndexEntry, Segment

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


class Drawn(NamedTuple):
    """One document in drawing order."""

    shard: int
    """Number of the shard in the source."""
    entry: int
    """Number of the sample in the shard."""
    tokens: int
    """Positions, image tokens included; 0 for an unusable sample."""
    panels: int
    """Canvases."""


class SourceOrder:
    """All documents of one source, for ever, by ordinal."""

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        sizer: Sizer,
        seed: int,
        open_shards: int,
        read: Callable[[Shard], Index],
    ) -> None:
        """`shards` in a fixed order, read one by one with `read`; at most `open_shards` make a block."""
        self.name = name
        self._shards = shards
        self._sizer = sizer
        self._seed = seed
        self._open_shards = open_shards
        self._read = read
        self.samples = sum(shard.header.samples for shard in shards)
        """Documents of one epoch, unusable ones included."""
        self._epochs: OrderedDict[int, tuple[list[int], list[int]]] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], list[Drawn]] = OrderedDict()
        self._indexes: OrderedDict[int, Index] = OrderedDict()

    def __getitem__(self, ordinal: int) -> Drawn:
        """The document at `ordinal` >= 0."""
        epoch, place = divmod(ordinal, self.samples)
        starts = self._epoch(epoch)[1]
        block = bisect_right(starts, place) - 1
        return self._block(epoch, block)[place - starts[block]]

    def entry(self, drawn: Drawn) -> IndexEntry:
        """The index entry of a document."""
        return self._index(drawn.shard).entries[drawn.entry]

    def shard_path(self, number: int) -> str:
        """Path of a shard's tar."""
        return self._shards[number].path

    def identity(self) -> str:
        """Short hash of what the shards hold and how it was tokenised; the folder they lie in does not matter."""
        headers = [shard.header for shard in self._shards]
        lines = [f"{header.samples} {header.members_sha256} {header.tokenizer_hash}" for header in headers]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def total_tokens(self) -> int:
        """Positions of all documents of one epoch; reads every index once, and keeps none."""
        return sum(sum(self._rooms(self._read(shard))[0]) for shard in self._shards)

    def _index(self, shard: int) -> Index:
        """The index of a shard, from memory if it was used lately."""
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
        else:
            self._indexes[shard] = self._read(self._shards[shard])
            if len(self._indexes) > OPEN_BLOCKS * self._open_shards:
                self._indexes.popitem(last=False)
        return self._indexes[shard]

    def _rooms(self, index: Index) -> tuple[list[int], list[int]]:
        """Positions and panels of every sample of a shard."""
        usable = [() if entry.unusable else entry.segments for entry in index.entries]
        tokens = [sum(map(self._sizer.tokens, segments)) for segments in usable]
        return tokens, [sum(map(self._sizer.panels, segments)) for segments in usable]

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

    def _block(self, epoch: int, block: int) -> list[Drawn]:
        """The documents of one block in order."""
        if (epoch, block) not in self._blocks:
            order = self._epoch(epoch)[0]
            shards = order[block * self._open_shards : (block + 1) * self._open_shards]
            rooms = [self._rooms(self._index(shard)) for shard in shards]
            columns = [
                np.concatenate([np.full(len(tokens), shard) for shard, (tokens, _) in zip(shards, rooms, strict=True)]),
                np.concatenate([np.arange(len(tokens)) for tokens, _ in rooms]),
                np.concatenate([np.array(tokens, np.int64) for tokens, _ in rooms]),
                np.concatenate([np.array(panels, np.int64) for _, panels in rooms]),
            ]
            shuffled = permutation(len(columns[0]), self._seed, "samples", self.name, epoch, block)
            self._blocks[epoch, block] = [
                Drawn(*row) for row in zip(*(column[shuffled].tolist() for column in columns), strict=True)
            ]
            if len(self._blocks) > OPEN_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[epoch, block]
