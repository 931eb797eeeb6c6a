"""Indexes: made in one pass over a tar, written beside it, opened by their first line, read with all their checks.

shard-000000.tar has shard-000000.index (mmtrain.data.columns describes the file).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, get_type_hints

from mmtrain.config.errors import DataError
from mmtrain.data.columns import Columns, Index
from mmtrain.data.documents import (
    BadSample,
    Content,
    content_of,
    encode_outlines,
    outline,
    segments_of,
)
from mmtrain.data.header import read_header
from mmtrain.data.record import IndexEntry, IndexHeader
from mmtrain.data.shards import RawSample, is_remote, patiently, read_members, scan
from mmtrain.data.tokenizer import Tokenizer

VERSION = 2
"""Format of index files; raised when an old reader would misread a new file."""

SUFFIX = ".index"
"""Ending of index files."""

MAX_HEADER_BYTES = 1 << 20
"""A first line is not longer."""

_HEADER_TYPES = get_type_hints(IndexHeader)

_CHUNK = 512  # samples whose texts are tokenised in one call


class Shard(NamedTuple):
    """A tar whose index has been checked, but not read beyond its header."""

    path: str
    """Path of the tar, or its address."""
    header: IndexHeader
    """Its totals."""
    index: str
    """Path of the index file."""


def index_path(tar: Path) -> Path:
    """Where the index of a local `tar` lies."""
    return tar.with_suffix(SUFFIX)


def build_index(tar: Path, tokenizer: Tokenizer, address: str = "") -> tuple[Index, str]:
    """Index a tar, ours or a foreign one, and say what is wrong with the tar itself (empty if nothing is).

    `address` is where a remote tar came from. Samples that cannot be used are recorded with the reason. DataError for
    unsafe members and keys that come twice.
    """
    samples, damage = scan(tar)
    _refuse_repeated_keys(tar, samples)
    entries: list[IndexEntry] = []
    for start in range(0, len(samples), _CHUNK):
        entries.extend(_entries(tar, samples[start : start + _CHUNK], tokenizer))
    columns = Columns.of(entries)
    header = IndexHeader(
        version=VERSION,
        tokenizer_hash=tokenizer.hash,
        shard=address or tar.name,
        shard_bytes=tar.stat().st_size,
        members_sha256=columns.members_sha256(),
        samples=len(entries),
        unusable=sum(bool(entry.unusable) for entry in entries),
        images=sum(entry.images for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        supervised=sum(entry.supervised for entry in entries),
    )
    return Index(address or str(tar), header, columns), damage


def write_index(index: Index, path: Path | None = None) -> Path:
    """Write `index` to `path` (default: beside its tar), whole or not at all; returns the path."""
    path = path or index_path(Path(index.path))
    partial = path.with_name(path.name + ".partial")
    payload, lengths = index.columns.to_bytes()
    line = asdict(index.header) | {"lengths": lengths, "payload_sha256": hashlib.sha256(payload).hexdigest()}
    with partial.open("wb") as file:
        file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape"))
        file.write(b"\n")
        file.write(payload)
    partial.replace(path)
    return path


def open_folder(folder: str | Path, tokenizer: Tokenizer) -> list[Shard]:
    """All shards of a source, in name order, reading no more than each index's first line.

    A tar lies beside its index, or where the index says. DataError if the folder or its shards are missing, a shard
    has no index, changed since, or was indexed for another tokenizer, chat template or set of special tokens.
    """
    shards = [check_index(path, tokenizer) for path in index_paths(Path(folder))]
    if not any(shard.header.samples > shard.header.unusable for shard in shards):
        raise DataError(f"data folder {folder}: {len(shards)} shards without a single usable sample; make them again")
    return shards


def index_paths(folder: Path) -> list[Path]:
    """Where the indexes of a folder's shards are or should be, sorted; DataError if there are no shards."""
    indexes = set(folder.glob("*" + SUFFIX))
    tars = set(map(index_path, shard_paths(folder))) if not indexes or any(folder.glob("*.tar")) else set()
    return sorted(indexes | tars, key=str)


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


def read_index(path: str | Path) -> Index:
    """All samples of a shard, from its index file; DataError if the file does not hold what it says."""
    path = Path(path)
    try:
        line, payload = patiently(lambda: _parts(path))
    except OSError as error:
        raise DataError(f"index {path}: cannot be read ({error.strerror}); {_again(path.parent)}") from None
    header, lengths, expected = _first_line(line, path)
    if hashlib.sha256(payload).hexdigest() != expected:
        raise DataError(
            f"index {path}: its {len(payload)} bytes of columns are not those that were written; {_again(path.parent)}"
        )
    try:
        columns = Columns.from_bytes(payload, lengths)
    except ValueError as error:
        raise DataError(f"index {path}: broken columns ({error}); {_again(path.parent)}") from None
    if len(columns) != header.samples:
        raise DataError(
            f"index {path}: {len(columns)} samples that are not the {header.samples} of its first line; "
            f"{_again(path.parent)}"
        )
    return Index(_tar_of(path, header), header, columns)


def _parts(path: Path) -> tuple[bytes, bytes]:
    """First line and columns of an index file."""
    with path.open("rb") as file:
        return file.readline(MAX_HEADER_BYTES), file.read()


def _tar_of(path: Path, header: IndexHeader) -> str:
    """Where the tar of an index is."""
    return header.shard if is_remote(header.shard) else str(path.with_suffix(".tar"))


def _first_line(line: bytes, path: Path) -> tuple[IndexHeader, dict[str, int], str]:
    """Header, lengths of columns and hash of an index's first line."""
    try:
        fields = json.loads(line)
        if fields["version"] != VERSION:
            raise DataError(
                f"index {path}: format {fields['version']}, this code reads {VERSION}; {_again(path.parent)}"
            )
        lengths, expected = fields.pop("lengths"), fields.pop("payload_sha256")
        header = IndexHeader(**fields)
        for name, kind in _HEADER_TYPES.items():
            if type(getattr(header, name)) is not kind:
                raise TypeError(f"{name} is {getattr(header, name)!r}")
        if not isinstance(lengths, dict):
            raise TypeError(f"lengths is {lengths!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"index {path}: broken first line ({error}); {_again(path.parent)}") from None
    return header, lengths, expected


def check_index(path: Path, tokenizer: Tokenizer) -> Shard:
    """The shard of an index by its first line; DataError if it does not hold for its tar or this tokenizer."""
    if not path.is_file():
        raise DataError(f"shard {path.with_suffix('.tar')}: no index beside it ({path.name}); {_again(path.parent)}")
    with path.open("rb") as file:
        header = _first_line(file.readline(MAX_HEADER_BYTES), path)[0]
    tar = _tar_of(path, header)
    if not is_remote(tar):  # the size of a remote one is checked when it has been fetched
        if not Path(tar).is_file():
            raise DataError(f"index {path}: its tar {Path(tar).name} is gone; restore it, or delete the index")
        size = Path(tar).stat().st_size
        if header.shard_bytes != size:
            raise DataError(f"shard {tar}: {size} bytes, but {header.shard_bytes} when indexed; {_again(path.parent)}")
    if header.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"shard {tar}: indexed for tokenizer {header.tokenizer_hash[:16]}, the recipe's is {tokenizer.hash[:16]} "
            "(file, chat template and special tokens count); correct data.tokenizer or data.chat_template, or "
            f"{_again(path.parent)}"
        )
    return Shard(tar, header, str(path))


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
