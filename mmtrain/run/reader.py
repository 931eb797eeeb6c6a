"""Opening a checkpoint: verify everything, then read any part of any tensor, whatever layout wrote it."""

import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.parallel.box import Box
from mmtrain.run import manifest, retain
from mmtrain.run.comm import Comm, SingleProcess
from mmtrain.run.entries import Entry, Run, local, runs
from mmtrain.run.manifest import Manifest, shortened
from mmtrain.run.shards import ShardFile, hash_file

log = logging.getLogger("mmtrain.run")

T = TypeVar("T")

_OPEN_FILES = 64  # of one reader at a time


class Reader:
    """A verified checkpoint. `open_checkpoint` makes it."""

    def __init__(self, folder: Path, contents: Manifest, entries: dict[str, list[Entry]]):
        self.folder, self.manifest = folder, contents
        self._index: dict[tuple[str, str], dict[tuple[Box, tuple[int, int]], tuple[str, Entry]]] = {}
        for file, held in sorted(entries.items()):
            for entry in held:  # of replicas, the first
                self._index.setdefault((entry.kind, entry.name), {}).setdefault((entry.box, entry.flat), (file, entry))
        self._files: OrderedDict[str, ShardFile] = OrderedDict()

    def close(self) -> None:
        """Let go of files and index; nothing can be read any more. A file that is open keeps its room on the disk."""
        while self._files:
            self._files.popitem()[1].close()
        self._index.clear()

    def names(self, kind: str = "param") -> list[str]:
        """Global names of the tensors that have this kind, sorted."""
        return sorted(name for other, name in self._index if other == kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape."""
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}")
        return self.manifest.tensors[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
        return {name: self.shape(name) for name in self.names()}

    def updates(self, name: str, kind: str = "exp_avg") -> int:
        """Updates that a moment of `name` has seen."""
        return max(entry.step for _, entry in self._pieces(kind, name))

    def file(self, name: str) -> bytes:
        """Content of another file of the checkpoint, such as tokenizer.json or recipe.yaml."""
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.folder} holds no {name}; it has {shortened(sorted(self.manifest.files))}")
        return (self.folder / name).read_bytes()

    def read(
        self, name: str, kind: str = "param", box: Box | None = None, flat: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Elements of a tensor in the dtype that was saved: the shape of `box` (None: all of it), or with `flat`, that
        range of the box's elements in row-major order, 1-D. What is read of a file is little more than that.
        """
        shape = self.shape(name)
        box = box or Box.whole(shape)
        if len(box.start) != len(shape) or any(stop > end for stop, end in zip(box.stop, shape, strict=True)):
            raise CheckpointError(f"{self.folder}: {box} reaches beyond {name}, which has shape {list(shape)}")
        first, last = flat or (0, box.numel)
        pieces = self._pieces(kind, name)
        out = torch.empty(last - first, dtype=self._open(pieces[0][0]).dtype(pieces[0][1]))
        wanted = [(run, run.box.numel) for run in runs(box, (first, last))]
        filled = 0
        for file, entry in pieces:
            if entry.box.intersect(box) is None or (entry.box == box and not _meet(entry.flat, (first, last))):
                continue  # most pieces of a large run leave here
            for have, (want, volume) in itertools.product(runs(entry.box, entry.flat), wanted):
                shared = have.box.intersect(want.box)
                if shared is None:
                    continue
                target = out[want.offset : want.offset + volume].view(want.box.shape)
                self._copy(file, entry, have, shared, target[local(shared, want.box)])
                filled += shared.numel
        if filled != last - first:
            raise CheckpointError(f"{self.folder}: {kind} of {name}: pieces fill {filled} of {last - first} elements")
        return out if flat else out.view(box.shape)

    def _pieces(self, kind: str, name: str) -> list[tuple[str, Entry]]:
        if (kind, name) not in self._index:
            raise CheckpointError(f"{self.folder} holds no {kind} of {name!r}")
        return list(self._index[kind, name].values())

    def _copy(self, file: str, entry: Entry, have: Run, shared: Box, target: torch.Tensor) -> None:
        """Fill `target` (of the box `shared`) from a run of an entry."""
        strides = [math.prod(have.box.shape[dim + 1 :]) for dim in range(len(have.box.shape))]
        inside = local(shared, have.box)
        first = sum(part.start * stride for part, stride in zip(inside, strides, strict=True))
        last = sum((part.stop - 1) * stride for part, stride in zip(inside, strides, strict=True)) + 1
        if target.is_contiguous() and target.numel() == last - first:
            self._open(file).read_into(entry, have.offset + first, target)
            return
        span = torch.empty(last - first, dtype=target.dtype)  # from the first element of `shared` to its last
        self._open(file).read_into(entry, have.offset + first, span)
        target.copy_(span.as_strided(shared.shape, strides))

    def _open(self, file: str) -> ShardFile:
        """The file, opened now or before."""
        if file not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[file] = ShardFile(self.folder / file)
        self._files.move_to_end(file)
        return self._files[file]


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two ranges share an element."""
    return max(a[0], b[0]) < min(a[1], b[1])


def open_checkpoint(folder: Path, comm: Comm | None = None) -> Reader:
    """Verify every file of `folder` (each once, by one rank) and open it. All ranks return, or all raise.

    CheckpointError: not a checkpoint, unknown version, a file missing, damaged, cut short, or not in the manifest.
    """
    comm = comm or SingleProcess()
    contents = _from_rank_0(comm, lambda: _read_manifest(folder))
    entries: dict[str, list[Entry]] = {}
    problems = []
    for name in sorted(contents.files)[comm.rank :: comm.world]:
        try:
            entries.update(_verified(folder, name, contents))
        except CheckpointError as error:
            problems.append(str(error))
    everyone = comm.all_gather_object((problems, entries))
    if problems := [text for found, _ in everyone for text in found]:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems[:4])}. {manifest.RESTORE}")
    return Reader(folder, contents, {name: held for _, found in everyone for name, held in found.items()})


def _from_rank_0(comm: Comm, work: Callable[[], T]) -> T:
    """The result of `work` on rank 0, or its CheckpointError, on every rank."""
    result: T | CheckpointError | None = None
    if comm.rank == 0:
        try:
            result = work()
        except CheckpointError as error:
            result = error
    result = comm.all_gather_object(result)[0]
    if isinstance(result, CheckpointError):
        raise result
    return result


def _read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that holds its files and no others."""
    contents = manifest.read(folder)
    present = {path.name for path in folder.iterdir()} - {manifest.NAME}
    if missing := sorted(contents.files.keys() - present):
        raise CheckpointError(f"{folder} is damaged: {shortened(missing)} is missing. {manifest.RESTORE}")
    if extra := sorted(present - contents.files.keys()):
        raise CheckpointError(
            f"{folder} is damaged: {shortened(extra)} is not in its manifest. Move it out if you put it there; "
            "otherwise do not trust the folder."
        )
    return contents


def _verified(folder: Path, name: str, contents: Manifest) -> dict[str, list[Entry]]:
    """What a file holds (nothing, for files without tensors), once its bytes are those that were written."""
    try:
        found, meant = hash_file(folder / name), contents.files[name]
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from None
    if found.size != meant.size:
        raise CheckpointError(f"{name} has {found.size} bytes, {meant.size} were written")
    if found.sha256 != meant.sha256:
        raise CheckpointError(f"{name} has sha256 {found.sha256[:12]}..., {meant.sha256[:12]}... was written")
    if not name.endswith(".safetensors"):
        return {}
    return {name: ShardFile(folder / name).entries()}


def newest(run_dir: Path, comm: Comm | None = None, before: int | None = None) -> Reader | None:
    """The newest good checkpoint of a run folder, with a loud line for each damaged one; None when there is none.

    before    only checkpoints of earlier steps than this
    CheckpointError when there are checkpoints and every one is damaged: starting over would hide the loss.
    """
    comm = comm or SingleProcess()
    found = _from_rank_0(comm, lambda: retain.committed(run_dir))
    folders = [folder for step, folder in found.items() if before is None or step < before]
    for folder in reversed(folders):
        try:
            reader = open_checkpoint(folder, comm)
        except CheckpointError as error:
            if comm.rank == 0:
                log.error("CHECKPOINT PASSED OVER: %s", error)
            continue
        if folder != folders[-1] and comm.rank == 0:
            log.error("going on from %s, the newest good one", folder)
        return reader
    if folders:
        names = shortened([folder.name for folder in folders])
        raise CheckpointError(
            f"{run_dir}: all {len(folders)} checkpoints are damaged ({names}). Restore one from a copy, or remove them "
            "to start over."
        )
    return None


def open_weights(path: Path, comm: Comm | None = None) -> Reader:
    """The checkpoint that `init_from` or a tool names: a step folder, or a run folder (its newest good one)."""
    comm = comm or SingleProcess()
    if _from_rank_0(comm, lambda: bool(retain.committed(path))) and (reader := newest(path, comm)):
        return reader
    return open_checkpoint(path, comm)
