"""The index beside each shard: made in one pass over a tar, written as JSON lines, read back with all its checks.

shard-000000.tar has shard-000000.index.jsonl: a line of totals and identity, then one line for each sample.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.config.tokens import TokenKind
from mmtrain.data.documents import (
    BadSample,
    Content,
    content_of,
    encode_outlines,
    outline,
    segments_of,
)
from mmtrain.data.header import read_header
from mmtrain.data.record import Index, IndexEntry, IndexHeader, Member, Segment
from mmtrain.data.shards import RawSample, read_members, scan
from mmtrain.data.tokenizer import Tokenizer

VERSION = 1
"""Format of index files; raised when an old reader would misread a new file."""

_CHUNK = 512  # samples whose texts are tokenised in one call


class Shard(NamedTuple):
    """A tar whose index has been checked, but not read beyond its header."""

    path: str
    """Path of the tar."""
    header: IndexHeader
    """Its totals."""


def index_path(tar: Path) -> Path:
    """Where the index of `tar` lies."""
    return tar.with_suffix(".index.jsonl")


def build_index(tar: Path, tokenizer: Tokenizer) -> tuple[Index, str]:
    """Index a tar, ours or a foreign one, and say what is wrong with the tar itself (empty if nothing is).

    Samples that cannot be used are recorded with the reason. DataError for unsafe members and keys that come twice.
    """
    samples, damage = scan(tar)
    _refuse_repeated_keys(tar, samples)
    entries: list[IndexEntry] = []
    for start in range(0, len(samples), _CHUNK):
        entries.extend(_entries(tar, samples[start : start + _CHUNK], tokenizer))
    header = IndexHeader(
        version=VERSION,
        tokenizer_hash=tokenizer.hash,
        shard=tar.name,
        shard_bytes=tar.stat().st_size,
        members_sha256=_members_hash(entries),
        samples=len(entries),
        unusable=sum(bool(entry.unusable) for entry in entries),
        images=sum(entry.images for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        supervised=sum(entry.supervised for entry in entries),
    )
    return Index(str(tar), header, tuple(entries)), damage


def write_index(index: Index) -> Path:
    """Write `index` beside its tar, whole or not at all; returns its path."""
    path = index_path(Path(index.path))
    partial = path.with_name(path.name + ".partial")
    lines = [asdict(index.header), *(_entry_to_json(entry) for entry in index.entries)]
    partial.write_text(
        "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines), "utf-8"
    )
    partial.replace(path)
    return path


def open_folder(folder: str | Path, tokenizer: Tokenizer) -> list[Shard]:
    """All shards of a source, in name order, reading no more than each index's first line.

    DataError if the folder or its shards are missing, a shard has no index, changed since, or was indexed for another
    tokenizer, chat template or set of special tokens.
    """
    tars = shard_paths(Path(folder))
    shards = [Shard(str(tar), _checked_header(tar, tokenizer)) for tar in tars]
    if not any(shard.header.samples > shard.header.unusable for shard in shards):
        raise DataError(f"data folder {folder}: {len(shards)} shards without a single usable sample; make them again")
    return shards


def shard_paths(folder: Path) -> list[Path]:
    """The tars of `folder`, sorted by name; DataError if there are none."""
    if not folder.is_dir():
        raise DataError(
            f"data folder {folder}: no such folder; correct the path, or make it with "
            f"`python -m tools.make_shards FORMAT INPUT --out {folder} --tokenizer F`"
        )
    tars = sorted(folder.glob("*.tar"))
    if tars:
        return tars
    if any(folder.glob("*.tar.*")):
        raise DataError(f"data folder {folder}: only compressed tars, which no byte range can be read of; unpack them")
    raise DataError(f"data folder {folder}: no .tar shards in it; make some with `python -m tools.make_shards`")


def read_index(shard: Shard) -> Index:
    """All entries of a shard that `open_folder` has checked; DataError if the file does not hold what it says."""
    path = index_path(Path(shard.path))
    with path.open(encoding="utf-8") as file:
        next(file)
        try:
            entries = tuple(_entry_from_json(json.loads(line)) for line in file)
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"index {path}: broken entry ({error}); {_again(path.parent)}") from None
    if len(entries) != shard.header.samples or _members_hash(entries) != shard.header.members_sha256:
        raise DataError(
            f"index {path}: {len(entries)} entries that are not the {shard.header.samples} of its header; "
            f"{_again(path.parent)}"
        )
    return Index(shard.path, shard.header, entries)


def _checked_header(tar: Path, tokenizer: Tokenizer) -> IndexHeader:
    """First line of the index of `tar`, if it still holds for this tar and this tokenizer."""
    path = index_path(tar)
    if not path.is_file():
        raise DataError(f"shard {tar}: no index beside it ({path.name}); {_again(tar.parent)}")
    try:
        with path.open(encoding="utf-8") as file:
            header = IndexHeader(**json.loads(file.readline()))
    except (ValueError, TypeError) as error:
        raise DataError(f"index {path}: broken first line ({error}); {_again(tar.parent)}") from None
    if header.version != VERSION:
        raise DataError(f"index {path}: format {header.version}, this code reads {VERSION}; {_again(tar.parent)}")
    size = tar.stat().st_size
    if header.shard_bytes != size:
        raise DataError(f"shard {tar}: {size} bytes, but {header.shard_bytes} when indexed; {_again(tar.parent)}")
    if header.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"shard {tar}: indexed for tokenizer {header.tokenizer_hash[:16]}, the recipe's is {tokenizer.hash[:16]} "
            "(file, chat template and special tokens count); correct data.tokenizer or data.chat_template, or "
            f"{_again(tar.parent)}"
        )
    return header


def _again(folder: Path) -> str:
    """The remedy of every index that does not fit."""
    return f"run `python -m tools.make_shards wds {folder} --tokenizer F --chat-template T`"


def _refuse_repeated_keys(tar: Path, samples: Sequence[RawSample]) -> None:
    """DataError if two runs of members have the same key."""
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            raise DataError(
                f"shard {tar}, key {sample.key!r}: comes twice, or its members are not neighbours; pack the folder "
                "again with each sample's members together"
            )
        seen.add(sample.key)


def _entries(tar: Path, samples: Sequence[RawSample], tokenizer: Tokenizer) -> Iterator[IndexEntry]:
    """Index entries of `samples`, texts tokenised together."""
    read = [_read(tar, sample) for sample in samples]
    outlines = [outline(item[0], tokenizer) for item in read if not isinstance(item, str)]
    encoded = iter(encode_outlines(outlines, tokenizer))
    for sample, item in zip(samples, read, strict=True):
        where = (sample.key, sample.offset, sample.size)
        if isinstance(item, str):
            yield IndexEntry(*where, "text", sample.members, (), unusable=item)
        else:
            content, sizes = item
            yield IndexEntry(*where, content.kind, sample.members, segments_of(next(encoded), sizes))


def _read(tar: Path, sample: RawSample) -> tuple[Content, dict[str, tuple[int, int]]] | str:
    """A sample's content and image sizes, or why it cannot be used."""
    if sample.damage:
        return sample.damage
    repeated = len(sample.members) - len({member.suffix for member in sample.members})
    if repeated:
        return f"{repeated} of its members have the name of another"
    try:
        members = read_members(tar, sample)
        content = content_of(members)
        sizes = {}
        for name in content.image_names():
            try:
                sizes[name] = read_header(members[name])[:2]
            except ValueError as error:
                return f"member {name}: {error}"
    except BadSample as error:
        return str(error)
    return content, sizes


def _members_hash(entries: Sequence[IndexEntry]) -> str:
    """Hash of what lies where in the tar."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.key, entry.offset, entry.size, entry.members]).encode())
    return digest.hexdigest()


def _entry_to_json(entry: IndexEntry) -> dict[str, Any]:
    """An entry as one short line: segments are [tokens, supervised] for text, [0, 0, width, height] for images."""
    segments = [[0, 0, s.width, s.height] if s.is_image else [s.tokens, s.supervised] for s in entry.segments]
    line = {
        "key": entry.key,
        "offset": entry.offset,
        "size": entry.size,
        "kind": entry.kind,
        "members": entry.members,
        "segments": segments,
    }
    return line | ({"unusable": entry.unusable} if entry.unusable else {})


def _entry_from_json(line: dict[str, Any]) -> IndexEntry:
    """The inverse of `_entry_to_json`."""
    segments = tuple(
        Segment(TokenKind.IMAGE if len(numbers) == 4 else TokenKind.TEXT, *numbers) for numbers in line["segments"]
    )
    members = tuple(Member(*member) for member in line["members"])
    return IndexEntry(
        line["key"], line["offset"], line["size"], line["kind"], members, segments, line.get("unusable", "")
    )
