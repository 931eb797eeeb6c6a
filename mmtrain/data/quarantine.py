"""Samples that are never read again: a file with lines of a ledger, looked up in the shards of a run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.data.index import Shard, read_index

NO_FILE = "none"
"""`Quarantine.hash` of a run without a file."""


class Quarantine(NamedTuple):
    """What a quarantine file names."""

    samples: frozenset[tuple[str, int]] = frozenset()
    """Path of the index, and row in it."""
    hash: str = NO_FILE
    """Short hash of the file."""


def read_quarantine(file: str, shards: Mapping[str, Sequence[Shard]]) -> Quarantine:
    """The samples that `file` names among `shards` (source -> its shards); an empty name for no file.

    Lines are JSON objects with `source`, `shard` (path, address or file name) and `key`; other fields are ignored, and
    so are sources that the run does not read. DataError if the file is missing, or a line is broken or names a shard or
    sample that its source does not have.
    """
    if not file:
        return Quarantine()
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"data.quarantine: {file} cannot be read ({error.strerror}); correct the path") from None
    named = {name: {_file_name(shard.path): shard for shard in of_source} for name, of_source in shards.items()}
    found: set[tuple[str, int]] = set()
    wanted: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"data.quarantine: {file}, line {number}"
        try:
            fields = json.loads(line)
            source, shard, key = fields["source"], _file_name(fields["shard"]), str(fields["key"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise DataError(f"{where}: not an object with source, shard and key ({error!r}); correct it") from None
        if source not in named:
            continue
        if shard not in named[source]:
            raise DataError(f"{where}: source {source} has no shard {shard}; correct or remove the line")
        wanted.setdefault(named[source][shard].index, []).append((key, where))
    for path, keys in wanted.items():
        columns = read_index(path).columns
        for key, where in keys:
            row = columns.find(key)
            if row is None:
                raise DataError(f"{where}: {path} has no sample {key!r}; correct or remove the line")
            found.add((path, row))
    return Quarantine(frozenset(found), hashlib.sha256(content).hexdigest()[:16])


def _file_name(shard: str) -> str:
    """Last part of a path or address: a folder may have moved."""
    return shard.rpartition("/")[2]
