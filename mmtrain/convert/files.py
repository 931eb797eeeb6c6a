"""Tensors of a Hugging Face folder: which there are, and one of them at a time.

safetensors are read by ranges (8 bytes of header length, JSON header, bytes of the tensors); .bin files through
torch.load(weights_only=True), which refuses everything in a pickle that is not a tensor.
"""

import json
import pickle
import struct
from pathlib import Path
from typing import Any, Protocol

import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.run.manifest import shortened

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types of weights that mean themselves; others are quantised and mean something else, or constants."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")

AGAIN = "Get the file anew"


class Shard(Protocol):
    """One open file."""

    shapes: dict[str, tuple[int, ...]]
    strange: dict[str, str]
    """Tensors whose type is none of TYPES, and that type."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in the type it has there."""
        ...


class SafetensorsShard:
    """A .safetensors file."""

    def __init__(self, path: Path) -> None:
        """CheckpointError: not such a file, or cut short."""
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 0 < length <= size - 8:
                raise CheckpointError(f"{path} is no safetensors file, or cut short inside its header. {AGAIN}")
            try:
                header: dict[str, Any] = json.loads(file.read(length))
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise CheckpointError(f"{path}: its header is not JSON. {AGAIN}") from None
        header.pop("__metadata__", None)
        self._start, self._entries = 8 + length, header
        end = self._start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < end:
            raise CheckpointError(f"{path} is cut short: it has {size:,} bytes, its header says {end:,}. {AGAIN}")
        self.strange = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in TYPES}
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}

    def read(self, name: str) -> torch.Tensor:
        """See Shard."""
        entry = self._entries[name]
        out = torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        if end - begin != out.numel() * out.element_size():
            raise CheckpointError(f"{self.path}: {name} has {end - begin} bytes, which is not its shape's. {AGAIN}")
        left = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + begin)
            while left:  # the kernel gives 2 GiB at a time
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{self.path} was cut short while it was read")
                left = left[count:]
        return out


class PickleShard:
    """A .bin file: mapped where its format allows that, so that a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """CheckpointError: it holds more than tensors, or cannot be read."""
        self.path = path
        try:
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before 2020, or damaged
                held = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path} is a pickle that holds more than tensors, and loading it could run anything. Convert it to "
                "safetensors where you trust it."
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} cannot be read ({reason}). {AGAIN}") from None
        self._held = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
        plain = TYPES.values()
        self.strange = {name: str(value.dtype) for name, value in self._held.items() if value.dtype not in plain}
        self.shapes = {name: tuple(value.shape) for name, value in self._held.items()}

    def read(self, name: str) -> torch.Tensor:
        """See Shard."""
        return self._held[name].clone()


class Folder:
    """The weights of a Hugging Face folder."""

    def __init__(self, path: Path) -> None:
        """Open every file and look at its header. CheckpointError: missing, damaged or disagreeing files."""
        self.path = path
        self._shards: dict[str, Shard] = {}
        self._file_of: dict[str, str] = {}
        for file, names in self._files().items():
            kind = SafetensorsShard if file.endswith(".safetensors") else PickleShard
            shard = self._shards[file] = kind(path / file)
            if names is not None and (lost := sorted(set(names) - shard.shapes.keys())):
                raise CheckpointError(f"{path / file} lacks {shortened(lost)}, which the index says it holds. {AGAIN}")
            self._file_of |= dict.fromkeys(shard.shapes if names is None else names, file)
        self.shapes = {name: self._shards[file].shapes[name] for name, file in self._file_of.items()}
        """Name of each tensor -> its shape."""
        self.strange = {name: kind for shard in self._shards.values() for name, kind in shard.strange.items()}
        """Name -> type of the tensors that are no plain weights."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in the type it has there."""
        return self._shards[self._file_of[name]].read(name)

    def _files(self) -> dict[str, list[str] | None]:
        """Weight file -> the tensors that the index puts there; None without an index: whatever it holds."""
        for index in INDEXES:
            if (self.path / index).is_file():
                return self._indexed(index)
        for single in SINGLES:
            if (self.path / single).is_file():
                return {single: None}
        there = sorted(path.name for path in self.path.iterdir())
        raise CheckpointError(
            f"{self.path} holds no weights: none of {', '.join((*INDEXES, *SINGLES))} is there, only "
            f"{shortened(there) or 'nothing'}. Get them from where {self.path.name} came from."
        )

    def _indexed(self, index: str) -> dict[str, list[str] | None]:
        """The shards that an index names; CheckpointError lists those that are not there."""
        try:
            files = json.loads((self.path / index).read_text("utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise CheckpointError(f"{self.path / index}: not the index of a sharded checkpoint. {AGAIN}") from None
        by_file: dict[str, list[str] | None] = {}
        for name, file in files.items():
            by_file.setdefault(file, []).append(name)
        if missing := sorted(file for file in by_file if not (self.path / file).is_file()):
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(by_file)} shards are missing: {shortened(missing)}. Get them too."
            )
        return dict(sorted(by_file.items()))
