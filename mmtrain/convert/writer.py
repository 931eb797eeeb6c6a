"""Writes safetensors shards and their index, one tensor at a time."""

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from mmtrain.convert.files import INDEXES, SINGLES, TYPES

SHARD_BYTES = 4 << 30


class Item(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """Its values, made when it is their turn."""


def write_weights(folder: Path, items: Sequence[Item], dtype: torch.dtype, limit: int = SHARD_BYTES) -> None:
    """Write `items` as model.safetensors, or as shards of about `limit` bytes with an index. ValueError: a shape."""
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[list[Item]] = [[]]
    held = 0
    for item in items:
        own = math.prod(item.shape) * size
        if shards[-1] and held + own > limit:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += own
    if len(shards) == 1:
        _write_shard(folder / SINGLES[0], shards[0], dtype, size)
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, dtype, size)
        files |= dict.fromkeys((item.name for item in shard), name)
    total = sum(math.prod(item.shape) for item in items) * size
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, items: Sequence[Item], dtype: torch.dtype, size: int) -> None:
    kind = next(name for name, known in TYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in items:
        end = offset + math.prod(item.shape) * size
        header[item.name] = {"dtype": kind, "shape": item.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for item in items:
            value = item.make().to(dtype).contiguous()
            if tuple(value.shape) != tuple(item.shape):
                raise ValueError(f"{item.name}: {tuple(value.shape)} was made, {item.shape} announced")
            file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
