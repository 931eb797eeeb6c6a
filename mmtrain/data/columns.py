"""The index file: a line of JSON, then columns of little-endian numbers, so that a shard's sizes are read at once.

    {"version": 2, "shard": "shard-000000.tar", ..., "lengths": {"offset": 1000, ...}, "payload_sha256": "..."}\\n
    columns one after another, in the order and of the types of COLUMNS, as many numbers as "lengths" says

Samples stand in tar order. `*_end` columns divide what follows between them: sample i has the members from
member_end[i - 1] (0 for the first) to member_end[i]. Texts are UTF-8, joined without separators.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmtrain.config.tokens import TokenKind
from mmtrain.data.record import IndexEntry, IndexHeader, Member, Segment

KINDS = ("caption", "interleaved", "text", "conversation")
"""Document kinds by their number in the `kind` column."""

COLUMNS: dict[str, str] = {
    "key_end": "<i8",  # bytes of `key`, by sample
    "key": "u1",
    "offset": "<i8",  # by sample: first byte of its run of members in the tar, bytes of the run, number in KINDS
    "size": "<i8",
    "kind": "u1",
    "reason_end": "<i8",  # bytes of `reason`, by sample: why it is unusable, nothing for a good one
    "reason": "u1",
    "member_end": "<i8",  # by sample
    "member_suffix": "<i4",  # by member: number of the suffix; first byte and bytes of its content in the tar
    "member_offset": "<i8",
    "member_size": "<i8",
    "suffix_end": "<i8",  # bytes of `suffix`, by different suffix
    "suffix": "u1",
    "segment_end": "<i8",  # by sample
    "segment_kind": "u1",  # by segment: TokenKind; tokens and targets of a text; pixels of an image
    "segment_tokens": "<i4",
    "segment_supervised": "<i4",
    "segment_width": "<i4",
    "segment_height": "<i4",
}
"""Name -> type, in file order."""

_BY_SAMPLE = ("offset", "size", "kind", "key_end", "reason_end", "member_end", "segment_end")
_DIVIDED = {
    "key_end": ("key",),
    "reason_end": ("reason",),
    "suffix_end": ("suffix",),
    "member_end": ("member_suffix", "member_offset", "member_size"),
    "segment_end": ("segment_kind", "segment_tokens", "segment_supervised", "segment_width", "segment_height"),
}


_MEMBER = [f"member_{name}" for name in Member._fields]
_SEGMENT = [f"segment_{name}" for name in Segment._fields]
_TOKEN_KINDS = {int(kind): kind for kind in TokenKind}


class Columns:
    """Samples of one shard, column by column: `columns["size"][i]` is a number of sample i."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        """Take arrays by the names of COLUMNS."""
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """One column."""
        return self._arrays[name]

    def __len__(self) -> int:
        """Samples."""
        return len(self["offset"])

    @classmethod
    def of(cls, entries: Sequence[IndexEntry]) -> "Columns":
        """The columns that hold `entries`."""
        members = [member for entry in entries for member in entry.members]
        segments = [segment for entry in entries for segment in entry.segments]
        suffixes = sorted({member.suffix for member in members})
        number = {suffix: at for at, suffix in enumerate(suffixes)}
        values: dict[str, Any] = {
            "offset": [entry.offset for entry in entries],
            "size": [entry.size for entry in entries],
            "kind": [KINDS.index(entry.kind) for entry in entries],
            "member_end": np.cumsum([len(entry.members) for entry in entries]),
            "segment_end": np.cumsum([len(entry.segments) for entry in entries]),
            "member_suffix": [number[member.suffix] for member in members],
            "member_offset": [member.offset for member in members],
            "member_size": [member.size for member in members],
        }
        for name in Segment._fields:
            values[f"segment_{name}"] = [getattr(segment, name) for segment in segments]
        for name, texts in {
            "key": [entry.key for entry in entries],
            "reason": [entry.unusable for entry in entries],
            "suffix": suffixes,
        }.items():
            # Names come back as the tar has them; a reason may quote what no text can hold.
            errors = "backslashreplace" if name == "reason" else "surrogateescape"
            coded = [text.encode("utf-8", errors) for text in texts]
            values[name] = np.frombuffer(b"".join(coded), np.uint8)
            values[f"{name}_end"] = np.cumsum([len(text) for text in coded])
        return cls({name: np.asarray(values[name]).astype(kind) for name, kind in COLUMNS.items()})

    @classmethod
    def from_bytes(cls, payload: bytes, lengths: dict[str, int]) -> "Columns":
        """Undo `to_bytes`; ValueError if the numbers cannot be an index's."""
        if set(lengths) != set(COLUMNS) or not all(isinstance(n, int) and n >= 0 for n in lengths.values()):
            raise ValueError("columns are missing or unknown")
        arrays, at = {}, 0
        for name, kind in COLUMNS.items():
            arrays[name] = np.frombuffer(payload, kind, min(lengths[name], len(payload)), at)
            at += arrays[name].nbytes
        if at != len(payload):
            raise ValueError(f"{len(payload)} bytes of columns, {at} expected")
        columns = cls(arrays)
        columns._check()
        return columns

    def to_bytes(self) -> tuple[bytes, dict[str, int]]:
        """Payload of the file, and the length of every column."""
        payload = b"".join(self[name].tobytes() for name in COLUMNS)
        return payload, {name: len(self[name]) for name in COLUMNS}

    def _check(self) -> None:
        """ValueError for numbers that would lead a reader out of the columns."""
        if len({len(self[name]) for name in _BY_SAMPLE}) > 1:
            raise ValueError("columns of samples differ in length")
        for end, divided in _DIVIDED.items():
            ends = self[end]
            last = int(ends[-1]) if len(ends) else 0
            if any(len(self[name]) != last for name in divided) or (np.diff(ends, prepend=0) < 0).any():
                raise ValueError(f"{end} does not divide its columns")
        for name in ("offset", "size", "member_offset", "member_size", *_DIVIDED["segment_end"]):
            if (self[name] < 0).any():
                raise ValueError(f"{name} is negative")
        if (self["kind"] >= len(KINDS)).any() or not np.isin(self["segment_kind"], list(TokenKind)).all():
            raise ValueError("an unknown kind")
        if ((self["member_suffix"] < 0) | (self["member_suffix"] >= len(self["suffix_end"]))).any():
            raise ValueError("an unknown suffix")

    @cached_property
    def _numbers(self) -> dict[str, memoryview]:
        """The columns again: a memoryview gives single numbers far faster than numpy, of native and aligned ones."""
        return {
            name: memoryview(np.require(self[name], np.dtype(kind).newbyteorder("="), "A"))
            for name, kind in COLUMNS.items()
        }

    def _part(self, ends: str, number: int) -> slice:
        """What belongs to part `number` of the columns that `ends` divides."""
        column = self._numbers[ends]
        return slice(column[number - 1] if number else 0, column[number])

    def text(self, name: str, number: int) -> str:
        """Text `number` of the columns `name` and `name`_end."""
        part = self._part(f"{name}_end", number)
        return str(self._numbers[name][part], "utf-8", "surrogateescape")

    @cached_property
    def _suffixes(self) -> list[str]:
        """The different suffixes, by number."""
        return [self.text("suffix", number) for number in range(len(self["suffix_end"]))]

    @cached_property
    def unusable(self) -> np.ndarray:
        """[samples] bool: whether there is a reason not to use it."""
        return np.diff(self["reason_end"], prepend=0) > 0

    def entry(self, number: int) -> IndexEntry:
        """One sample."""
        numbers = self._numbers
        members, segments = self._part("member_end", number), self._part("segment_end", number)
        suffixes, *places = (numbers[name][members].tolist() for name in _MEMBER)
        kinds, *sizes = (numbers[name][segments].tolist() for name in _SEGMENT)
        return IndexEntry(
            self.text("key", number),
            numbers["offset"][number],
            numbers["size"][number],
            KINDS[numbers["kind"][number]],
            tuple(map(Member, map(self._suffixes.__getitem__, suffixes), *places)),
            tuple(map(Segment, map(_TOKEN_KINDS.__getitem__, kinds), *sizes)),
            self.text("reason", number),
        )

    def find(self, key: str) -> int | None:
        """Number of the sample called `key`, None if there is none."""
        wanted = key.encode("utf-8", "surrogateescape")
        for number in np.flatnonzero(np.diff(self["key_end"], prepend=0) == len(wanted)).tolist():
            if self["key"][self._part("key_end", number)].tobytes() == wanted:
                return number
        return None

    def members_sha256(self) -> str:
        """Hash of what lies where in the tar."""
        digest = hashlib.sha256()
        for name in COLUMNS:
            if not name.startswith(("segment", "reason", "kind")):
                digest.update(self[name].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Index:
    """What one shard holds."""

    path: str
    """Path or address of the tar."""
    header: IndexHeader
    """Totals and identity."""
    columns: Columns
    """Samples in tar order."""

    @cached_property
    def entries(self) -> tuple[IndexEntry, ...]:
        """All samples, one by one: for tools; the plan works on columns."""
        return tuple(map(self.columns.entry, range(len(self.columns))))

    def __eq__(self, other: object) -> bool:
        """Whether tar, totals and samples are equal."""
        if not isinstance(other, Index):
            return NotImplemented
        same = self.path == other.path and self.header == other.header
        return same and self.columns.to_bytes() == other.columns.to_bytes()

    __hash__ = None  # type: ignore[assignment]
