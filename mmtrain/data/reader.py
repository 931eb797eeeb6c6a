"""Reading and decoding one planned pack: the same code in the training process and in decoding processes."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtrain.config.errors import DataError
from mmtrain.config.schema import LossWeights
from mmtrain.data.cache import ShardCache, default_folder
from mmtrain.data.collate import EVEN, PackArrays, Shape, Slot, collate_pack, lay_out
from mmtrain.data.columns import Index
from mmtrain.data.documents import BadSample, Found, decode_documents
from mmtrain.data.index import read_index
from mmtrain.data.ordering import Planned
from mmtrain.data.record import Document, IndexEntry
from mmtrain.data.shards import is_remote, read_members
from mmtrain.data.tokenizer import Tokenizer

MAX_SAMPLE_BYTES = 1 << 30
"""Samples of more bytes are refused before reading."""

READ_BYTES = 64 << 20
"""Samples are read several at once as long as they have no more bytes together."""

OPEN_INDEXES = 64
"""Indexes that a reader keeps; a pack takes from few shards, which neighbouring packs take from as well."""


@dataclass(frozen=True)
class ReaderSpec:
    """All that a decoding process needs to know, as plain values."""

    tokenizer: str
    """Path of the tokenizer."""
    chat_template: str
    """Name of the chat template."""
    shape: Shape
    """Sizes of packs and images."""
    sources: tuple[str, ...]
    """Names of the sources, by number."""
    cache: str = ""
    """Folder for copies of remote shards; empty for the default."""
    cache_bytes: int = 0
    """Bytes that they take at most."""
    loss_weights: LossWeights = EVEN
    """What targets count."""

    def open_cache(self) -> ShardCache:
        """Where copies of remote shards lie."""
        return ShardCache(Path(self.cache) if self.cache else default_folder(), self.cache_bytes)


class ReadPack(NamedTuple):
    """A decoded pack."""

    arrays: PackArrays
    """What the model reads."""
    ledger: list[dict[str, Any]]
    """Samples that were not used: source, shard, key, reason, and the tokens that stay padding in their place."""


class _Place(NamedTuple):
    """A place of a pack, and what the index says about its sample."""

    planned: Planned
    index: Index
    entry: IndexEntry


def panels_of(pack: Sequence[Planned]) -> int:
    """Images that a pack holds if all its samples are good."""
    return sum([planned.panels for planned in pack])


class Reader:
    """Reads and decodes packs."""

    def __init__(self, spec: ReaderSpec, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` saves loading the one of `spec` again."""
        self._spec = spec
        self._tokenizer = tokenizer or Tokenizer(spec.tokenizer, spec.chat_template)
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._cache = spec.open_cache()

    def read(self, pack: Sequence[Planned], memory: np.ndarray | None = None) -> ReadPack:
        """Decode a pack, into `memory` (uint8) if that is given; DataError if the index is wrong.

        Bad samples, and those that the plan withholds, become padding and lines of the ledger.
        """
        shape, image_id, pad_id = self._spec.shape, self._tokenizer.image_id, self._tokenizer.pad_id
        panels = panels_of(pack)
        arrays = PackArrays.fresh(shape, panels) if memory is None else PackArrays.within(memory, shape, panels)
        slots: list[Slot] = []
        ledger: list[dict[str, Any]] = []
        used = 0  # places of images
        for (planned, index, entry), document in self._documents(pack):
            laid = None
            try:
                if isinstance(document, BadSample):
                    raise document
                laid = lay_out(document, planned.cut, shape, arrays.panels[used:])
            except BadSample as error:
                source = self._spec.sources[planned.source]
                where = {"source": source, "shard": index.path, "key": entry.key}
                ledger.append({**where, "reason": str(error), "tokens": planned.tokens})
            if laid is not None and laid.length != planned.tokens:
                raise DataError(
                    f"shard {index.path}, sample {entry.key}: {laid.length} tokens with its images, "
                    f"but its index planned {planned.tokens}; an image changed its size: index the folder again with "
                    "`python -m tools.make_shards wds FOLDER --tokenizer F`"
                )
            used += len(laid.images) if laid else 0
            slots.append(Slot(entry.key, planned.source, planned.tokens, laid))
        return ReadPack(collate_pack(slots, arrays, shape, image_id, pad_id, self._spec.loss_weights), ledger)

    def _documents(self, pack: Sequence[Planned]) -> Iterator[tuple[_Place, Document | BadSample]]:
        """Each place of a pack with its document, or the reason why there is none.

        Samples are read, and their texts tokenised, as many at once as come to READ_BYTES.
        """
        held: list[_Place] = []
        size = 0
        for planned in pack:
            index = self._index(planned.index)
            entry = index.columns.entry(planned.row)
            if held and size + entry.size > READ_BYTES:
                yield from zip(held, self._decoded(held), strict=True)
                held, size = [], 0
            held.append(_Place(planned, index, entry))
            size += entry.size
        yield from zip(held, self._decoded(held), strict=True)

    def _decoded(self, places: Sequence[_Place]) -> list[Document | BadSample]:
        """The document of each place."""
        files = [self._files(place) for place in places]
        good = [
            Found(index.path, entry, found)
            for (_, index, entry), found in zip(places, files, strict=True)
            if not isinstance(found, BadSample)
        ]
        documents = iter(decode_documents(good, self._tokenizer))
        return [found if isinstance(found, BadSample) else next(documents) for found in files]

    def _files(self, place: _Place) -> dict[str, bytes] | BadSample:
        """A sample's files, or why they are not to be had."""
        planned, index, entry = place
        if planned.withheld:
            return BadSample(planned.withheld)
        if entry.size > MAX_SAMPLE_BYTES:
            return BadSample(f"{entry.size} bytes, more than the {MAX_SAMPLE_BYTES} that are read")
        try:
            return self._members(index, entry)
        except BadSample as error:
            return error

    def _index(self, path: str) -> Index:
        """An index, from memory if it was used lately."""
        if path in self._indexes:
            self._indexes.move_to_end(path)
        else:
            self._indexes[path] = read_index(path)
            if len(self._indexes) > OPEN_INDEXES:
                self._indexes.popitem(last=False)
        return self._indexes[path]

    def _members(self, index: Index, entry: IndexEntry) -> dict[str, bytes]:
        """Files of a sample, from its tar or from the copy of a remote one."""
        if not is_remote(index.path):
            return read_members(index.path, entry)
        while True:
            copy = self._cache.local(index.path, index.header.shard_bytes)
            try:
                return read_members(copy, entry)
            except DataError:
                if copy.exists():
                    raise  # else another process needed its room; fetch it again
