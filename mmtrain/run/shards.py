"""One rank's safetensors file: written in one pass (header, tensors, sha256, fsync), read by ranges.

The format is safetensors' own (8 bytes of header length, JSON header, bytes of the tensors), so the safetensors
library reads it. We write it ourselves to hash, in the same pass, the bytes that were meant, not those that a disk gave
back; and read it ourselves to fill tensors in place.
"""

import hashlib
import json
import os
import struct
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.run.entries import Entry
from mmtrain.run.manifest import FileRecord

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}
_CHUNK = 4 << 20  # bytes hashed and written at a time: stays in cache between the two


def shard_name(rank: int) -> str:
    """File name of a rank's tensors."""
    return f"rank_{rank:05d}.safetensors"


def write_shard(path: Path, pieces: Iterable[tuple[Entry, torch.Tensor]]) -> FileRecord:
    """Write contiguous CPU tensors with what each of them covers. On return they are on disk; OSError otherwise."""
    pieces = list(pieces)
    header: dict[str, object] = {"__metadata__": {"entries": json.dumps([entry.as_json() for entry, _ in pieces])}}
    offset = 0
    for entry, tensor in pieces:
        size = tensor.numel() * tensor.element_size()
        header[entry.key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": entry.stored_shape(),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (struct.pack("<Q", len(text)), text, *(_as_bytes(tensor) for _, tensor in pieces)):
            for first in range(0, len(part), _CHUNK):
                chunk = part[first : first + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
        _sync(file)
    return FileRecord(8 + len(text) + offset, digest.hexdigest())


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a small file to disk."""
    with path.open("wb") as file:
        file.write(data)
        _sync(file)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the folder's list of names durable: without it a crash may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> FileRecord:
    """Size and sha256 of a file as it lies on disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(file.tell(), digest.hexdigest())


class ShardFile:
    """A (verified) shard, open for reading: what it holds, and any range of it.

    Plain reads, not a memory map: page faults cost more than the copy (measured 83 MB/s against 1 GB/s and more), and
    parallel file systems dislike them.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self.close = weakref.finalize(self, self._file.close)  # by hand, or when nobody holds this any more
        (size,) = struct.unpack("<Q", self._file.read(8))
        self._header = json.loads(self._file.read(size))
        self._start = 8 + size
        if "entries" not in self._header.get("__metadata__", {}):
            raise CheckpointError(f"{path}: no list of entries in the header; another program wrote it")

    def entries(self) -> list[Entry]:
        """What lies in the file."""
        return [Entry.from_json(value) for value in json.loads(self._header["__metadata__"]["entries"])]

    def dtype(self, entry: Entry) -> torch.dtype:
        """Type of an entry's elements."""
        return _TYPES[self._header[entry.key]["dtype"]]

    def read_into(self, entry: Entry, first: int, out: torch.Tensor) -> None:
        """Fill a contiguous tensor with the entry's elements from element `first` on, in row-major order."""
        begin, end = self._header[entry.key]["data_offsets"]
        place, left = begin + first * out.element_size(), _as_bytes(out)
        if place + len(left) > end:
            raise CheckpointError(f"{self._file.name}: {entry.key} ends before element {first + out.numel()}")
        self._file.seek(self._start + place)
        while left:  # the kernel gives 2 GiB at a time
            count = self._file.readinto(left)
            if not count:
                raise CheckpointError(f"{self._file.name} was cut short while it was read")
            left = left[count:]
