"""Reading and decoding one planned pack: the same code in the training process and in decoding processes."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config.errors import DataError
from mmtrain.config.schema import LossWeights
from mmtrain.data.cache import ShardCache, default_folder
from mmtrain.data.collate import EVEN, PackArrays, Shape, Slot, collate_pack, lay_out
from mmtrain.data.columns import Index
from mmtrain.data.documents import BadSample, decode_document
from mmtrain.data.index import read_index
from mmtrain.data.ordering import Planned
from mmtrain.data.record import IndexEntry
from mmtrain.data.shards import is_remote, read_members
from mmtrain.data.tokenizer import Tokenizer

MAX_SAMPLE_BYTES = 1 << 30
"""Samples of more bytes are refused before reading."""


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


@dataclass(frozen=True)
class ReadPack:
    """A decoded pack."""

    arrays: PackArrays
    """What the model reads."""
    ledger: list[dict[str, Any]]
    """Samples that were not used: source, shard, key, reason, and the tokens that stay padding in their place."""


class Reader:
    """Reads and decodes packs."""

    def __init__(self, spec: ReaderSpec, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` saves loading the one of `spec` again."""
        self._spec = spec
        self._tokenizer = tokenizer or Tokenizer(spec.tokenizer, spec.chat_template)
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._cache = ShardCache(Path(spec.cache) if spec.cache else default_folder(), spec.cache_bytes)

    def read(self, pack: Sequence[Planned]) -> ReadPack:
        """Decode a pack; DataError if the index is wrong.

        Bad samples, and those that the plan withholds, become padding and lines of the ledger.
        """
        slots, ledger = [], []
        for planned in pack:
            index = self._index(planned.index)
            entry = index.columns.entry(planned.row)
            laid = None
            try:
                if planned.withheld:
                    raise BadSample(planned.withheld)
                if entry.size > MAX_SAMPLE_BYTES:
                    raise BadSample(f"{entry.size} bytes, more than the {MAX_SAMPLE_BYTES} that are read")
                members = self._members(index, entry)
                document = decode_document(entry, members, self._tokenizer, index.path)
                laid = lay_out(document, planned.cut, self._spec.shape, self._tokenizer.image_id)
            except BadSample as error:
                source = self._spec.sources[planned.source]
                where = {"source": source, "shard": index.path, "key": entry.key}
                ledger.append({**where, "reason": str(error), "tokens": planned.tokens})
            if laid is not None and len(laid.tokens) != planned.tokens:
                raise DataError(
                    f"shard {index.path}, sample {entry.key}: {len(laid.tokens)} tokens with its images, "
                    f"but its index planned {planned.tokens}; an image changed its size: index the folder again with "
                    "`python -m tools.make_shards wds FOLDER --tokenizer F`"
                )
            slots.append(Slot(entry.key, planned.source, planned.tokens, laid))
        ids = self._tokenizer.image_id, self._tokenizer.pad_id
        arrays = collate_pack(slots, self._spec.shape, *ids, self._spec.loss_weights)
        return ReadPack(arrays, ledger)

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
