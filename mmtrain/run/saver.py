"""Writing checkpoints while training goes on.

`Saver.save` copies a rank's pieces to host memory, which is all that training waits for; a thread writes them:

    every rank    step_N.tmp/rank_R.safetensors, fsynced; then vote_R.json: what it wrote and its hash
    rank 0        waits for all votes, checks that the pieces tile every tensor, writes the other files and the
                  manifest, fsyncs, renames step_N.tmp to step_N, removes what retention lets go

The threads use no collective (those of the training threads would mix with them). A save that fails removes its .tmp
folder and says so in one loud line; the last good checkpoint stays as it is and training goes on, unless the save was
the last one: `wait` raises.
"""

import contextlib
import json
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.parallel.box import Box, Piece
from mmtrain.run import manifest, retain
from mmtrain.run.comm import Comm
from mmtrain.run.entries import Entry, check_cover
from mmtrain.run.manifest import FileRecord, Manifest, RunState, shortened
from mmtrain.run.shards import shard_name, sync_folder, write_file, write_shard

log = logging.getLogger("mmtrain.run")

RECIPE = "recipe.yaml"
_POLL = 0.02  # seconds between two looks for votes
_YIELD = 1e-3  # seconds: a new thread would keep the interpreter for 5 ms while `save` waits for it to have begun
_SHARD_BYTES = 1 << 30
_GRACE = 30.0  # seconds to wait for votes once the training thread has ended: the other ranks may be gone


class _Job(NamedTuple):
    step: int
    pieces: list[tuple[Entry, torch.Tensor]]
    state: RunState
    files: Mapping[str, bytes]
    tmp: Path


class Saver:
    """Saves into `run_dir`. Every method is called by all ranks together, on their main threads.

    keep_last, keep_every, keep_best   as in the recipe's checkpoint section
    time_limit                         seconds that rank 0 waits for the files of the others
    """

    def __init__(
        self,
        run_dir: Path,
        comm: Comm,
        keep_last: int = 2,
        keep_every: int = 0,
        keep_best: bool = False,
        time_limit: float = 1800.0,
    ):
        self.run_dir, self.comm, self.time_limit = run_dir, comm, time_limit
        self._keep = (keep_last, keep_every, keep_best)
        self._thread: threading.Thread | None = None
        self._alone = threading.Event()
        self._failure = ""
        self._bug: Exception | None = None
        self._host: dict[str, torch.Tensor] = {}

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        state: RunState,
        files: Mapping[str, bytes] | None = None,
        last: bool = False,
    ) -> None:
        """Start saving this rank's `pieces` as of `step`; wait for the save before, if that is still being written.

        `state` and `files` (name -> content, e.g. tokenizer.json) are rank 0's. The tensors may change as soon as
        this returns; after the `last` save of a run, only after `wait`: what lies in host memory is not copied then.
        A failure of the save before was a loud line already and is forgotten here.
        """
        self.settle()
        tmp = retain.step_folder(self.run_dir, step).with_suffix(".tmp")
        self._failure = self._fresh(tmp) if self.comm.rank == 0 else ""
        if self.comm.all_gather_object(self._failure)[0]:
            return
        job = _Job(step, self._to_host(pieces, last), state, files or {}, tmp)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"save step {step}")
        self._thread.start()

    def wait(self) -> None:
        """Return when the newest save is committed. CheckpointError, on all ranks, when it failed."""
        if failures := self.settle():
            last = max(retain.committed(self.run_dir), default=None)
            good = f"The last good checkpoint is step {last}" if last is not None else "There is no checkpoint"
            raise CheckpointError(f"{failures[0]}. {good} in {self.run_dir}. Mend that, then run the same command.")

    def finish_alone(self) -> None:
        """Wait for this rank's thread without the other ranks, because training has failed here or everywhere.

        Rank 0's thread gives the others _GRACE seconds, or what is left of its time limit if that is less.
        """
        if self._thread is not None:
            self._alone.set()
            self._thread.join()

    def settle(self) -> list[str]:
        """Wait for all ranks' threads; what kept them from saving. An error that is no disk's is raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        mine, bug = self._failure, self._bug
        self._failure, self._bug = "", None
        everyone = self.comm.all_gather_object((mine, "" if bug is None else repr(bug)))
        if bug is not None:
            raise bug
        if others := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(everyone) if text]:
            raise RuntimeError(f"the thread that saves failed on {others[0]}")
        return [text for text, _ in everyone if text]

    def _fresh(self, tmp: Path) -> str:
        """Make the empty folder that all ranks write to; the reason when that fails."""
        try:
            if tmp.exists():
                shutil.rmtree(tmp)
            tmp.mkdir(parents=True)
        except OSError as error:
            return _loud(tmp, error)
        return ""

    def _to_host(self, pieces: Iterable[Piece], last: bool) -> list[tuple[Entry, torch.Tensor]]:
        """Copies of the pieces, in host memory that is kept from save to save: new pages cost more than the copy.

        The last save frees that memory first, and takes pieces that lie in host memory as they are.
        """
        if last:
            self._host.clear()
        copies: list[tuple[Entry, torch.Tensor]] = []
        numbers: Counter[tuple[str, str]] = Counter()
        pinned = False
        for piece in pieces:
            live = piece.tensor
            assert live.numel() == piece.flat[1] - piece.flat[0], f"{piece.name}: {live.numel()} elements, {piece.flat}"
            if live.numel() == 0:
                continue
            numbers[piece.kind, piece.name] += 1
            entry = Entry.of(piece, numbers[piece.kind, piece.name])
            if last and not live.is_cuda and live.is_contiguous():
                copies.append((entry, live))
                continue
            copy = self._host.get(entry.key)
            if copy is None or copy.shape != live.shape or copy.dtype != live.dtype:
                copy = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
                self._host[entry.key] = copy
            copy.copy_(live, non_blocking=True)
            copies.append((entry, copy))
            pinned |= live.is_cuda
        if pinned:  # the copies above are still under way
            torch.cuda.synchronize()
        return copies

    def _run(self, job: _Job) -> None:
        """The thread."""
        time.sleep(_YIELD)
        try:
            record = write_shard(job.tmp / shard_name(self.comm.rank), job.pieces)
            entries = [entry.as_json() for entry, _ in job.pieces]
            _vote(job.tmp, self.comm.rank, {"size": record.size, "sha256": record.sha256, "entries": entries})
            if self.comm.rank == 0:
                self._commit(job)
        except Exception as error:
            if not isinstance(error, OSError | CheckpointError):
                self._bug = error
            self._give_up(job, error)

    def _commit(self, job: _Job) -> None:
        """Rank 0: from the votes of all ranks to one rename."""
        votes = self._await_votes(job.tmp)
        entries = [Entry.from_json(value) for vote in votes for value in vote["entries"]]
        files = {shard_name(rank): FileRecord(vote["size"], vote["sha256"]) for rank, vote in enumerate(votes)}
        for rank in range(self.comm.world):
            _vote_path(job.tmp, rank).unlink()
        seal(job.tmp, job.step, entries, files, job.state, job.files)
        try:
            retain.remove_surplus(self.run_dir, job.step, *self._keep)
        except OSError as error:
            log.error("step %d is saved, but an old checkpoint could not be removed: %s", job.step, error)

    def _await_votes(self, tmp: Path) -> list[dict[str, Any]]:
        """Rank 0: every rank's vote, by rank. CheckpointError names the ranks that failed or did not answer in time."""
        votes: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.time_limit
        orphaned = False
        while missing := [rank for rank in range(self.comm.world) if rank not in votes]:
            for rank in missing:
                if (path := _vote_path(tmp, rank)).exists():
                    votes[rank] = json.loads(path.read_bytes())
                    if "error" in votes[rank]:
                        raise CheckpointError(f"rank {rank} could not write its file: {votes[rank]['error']}")
            if not orphaned and (self._alone.is_set() or not threading.main_thread().is_alive()):
                orphaned, deadline = True, min(deadline, time.monotonic() + _GRACE)
            if len(votes) < self.comm.world and time.monotonic() > deadline:
                late = shortened([str(rank) for rank in missing])
                raise CheckpointError(f"no file from rank {late} of {self.comm.world} after {self.time_limit:g} s")
            time.sleep(_POLL if len(votes) < self.comm.world else 0)
        return [votes[rank] for rank in range(self.comm.world)]

    def _give_up(self, job: _Job, error: Exception) -> None:
        """Make room, tell rank 0, say it loudly."""
        self._failure = _loud(job.tmp, error)
        if self.comm.rank == 0:
            shutil.rmtree(job.tmp, ignore_errors=True)
            return
        with contextlib.suppress(OSError):  # without room even for the vote, rank 0 runs into its time limit
            (job.tmp / shard_name(self.comm.rank)).unlink(missing_ok=True)
            _vote(job.tmp, self.comm.rank, {"error": str(error)})


def seal(
    tmp: Path,
    step: int,
    entries: Iterable[Entry],
    shards: Mapping[str, FileRecord],
    state: RunState,
    files: Mapping[str, bytes],
) -> Path:
    """Make a folder whose shards are on disk a checkpoint: other files, manifest, one rename. Returns its new path.

    CheckpointError: the entries do not tile every tensor, or somebody else's file lies there.
    """
    tensors = check_cover(entries)
    records = dict(shards)
    for name, content in {RECIPE: state.recipe.encode(), **files}.items():
        records[name] = write_file(tmp / name, content)
    write_file(tmp / manifest.NAME, manifest.encode(Manifest(step, state, records, tensors)))
    if strange := {path.name for path in tmp.iterdir()} - records.keys() - {manifest.NAME}:
        raise CheckpointError(f"{shortened(sorted(strange))} appeared in the folder: does another job write there?")
    sync_folder(tmp)
    folder = retain.step_folder(tmp.parent, step)
    if folder.exists():  # a damaged one: the run went on from an older checkpoint and came by again
        retain.remove(folder)
    tmp.rename(folder)
    sync_folder(tmp.parent)
    return folder


def write_whole(
    run_dir: Path, step: int, tensors: Iterable[tuple[str, torch.Tensor]], state: RunState, files: Mapping[str, bytes]
) -> Path:
    """Write weights that come one by one, from one process, as a checkpoint: for tools that convert.

    Never holds more than _SHARD_BYTES of them and one tensor. CheckpointError: the step exists already.
    """
    folder = retain.step_folder(run_dir, step)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another --out, or remove it")
    tmp = folder.with_suffix(".tmp")
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    entries: list[Entry] = []
    shards: dict[str, FileRecord] = {}
    held: list[tuple[Entry, torch.Tensor]] = []

    def flush() -> None:
        name = shard_name(len(shards))
        shards[name] = write_shard(tmp / name, held)
        entries.extend(entry for entry, _ in held)
        held.clear()

    for name, tensor in tensors:
        shape = tuple(tensor.shape)
        piece = Piece(name, "param", shape, Box.whole(shape), (0, tensor.numel()), tensor.contiguous().view(-1))
        held.append((Entry.of(piece), piece.tensor))
        if sum(values.numel() * values.element_size() for _, values in held) >= _SHARD_BYTES:
            flush()
    if held:
        flush()
    return seal(tmp, step, entries, shards, state, files)


def _vote_path(tmp: Path, rank: int) -> Path:
    return tmp / f"vote_{rank:05d}.json"


def _vote(tmp: Path, rank: int, vote: dict[str, Any]) -> None:
    """Leave a vote for rank 0; it appears whole or not at all."""
    path = _vote_path(tmp, rank)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(vote))
    part.rename(path)


def _loud(tmp: Path, error: Exception) -> str:
    """Log that a save failed, and return what was said."""
    text = f"CHECKPOINT NOT SAVED: {tmp.stem}: {error or type(error).__name__}"
    log.error("%s. Older checkpoints are untouched.", text)
    return text
