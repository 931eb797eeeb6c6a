"""Signs of life: a rank that stalls is named, and nobody waits for it until a collective times out.

A thread of every rank writes OUT/.beats/rank_00003 a few times in `limit` seconds: a count, and where the training
thread is. Rank 0's thread reads all of these files, the others read rank 0's. Files, because a stopped process answers
no socket; written in place, because a full disk takes no new ones; counts, because the clocks of nodes differ. A rank
is stalled when

    its count stands still for `limit` seconds: the process was stopped or killed, its node or its disk is gone
    its training thread stays in one phase of a step for `limit` seconds and ten times as long as that ever took

Ranks that wait for the stalled one stay where they are, too: of those, the one that has come least far is meant. Only
phases of steps are judged by their length, because a first compilation, a long evaluation or a slow disk at a save may
take any time. A rank that fails leaves its reason in its file, so that the others need not find out by waiting.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mmtrain.run.comm import Comm
from mmtrain.run.metrics import PHASES

FOLDER = ".beats"
EXIT_STALLED = 77
"""Exit code of ranks that end because another one stalled or failed."""
WAITING = "waiting after "
"""A phase has ended here; what follows may need the other ranks."""

_BEATS = 12  # in `limit` seconds
_SLACK = 10.0  # how many times longer than ever before a phase may take, beyond the limit
_BYTES = 4096  # of a rank's file, whatever it says
_WORDS = 600  # characters of a reason, at most six bytes each
_LAST_WORDS = 5.0  # seconds in which the launcher may end a rank, once another one has told why it failed


class Beat(NamedTuple):
    """What a rank's file says."""

    count: int
    """Goes up while the process lives."""
    place: int
    """Phases that the training thread has entered; the same sequence on every rank."""
    step: int
    phase: str
    seconds: float
    """How long it has been there."""
    late: bool
    """Whether that is longer than it may be."""
    failed: str
    """Why this rank ends, or has found that the job must end; empty while it goes on."""


class Heartbeat:
    """One of each rank, for the time of a run: `with Heartbeat(...) as heart`.

    limit   seconds; 0 starts no thread
    """

    def __init__(self, run_dir: Path, comm: Comm, limit: float):
        self._folder, self._rank, self._world, self._limit = run_dir / FOLDER, comm.rank, comm.world, limit
        self._place = (0, 0, "start", time.monotonic())  # replaced as a whole: another thread reads it
        self._longest: dict[str, float] = defaultdict(float)
        self._over = threading.Event()
        self._beat: Beat | None = None
        if comm.rank == 0 and limit:
            self._folder.mkdir(exist_ok=True)
            for old in self._folder.iterdir():
                old.unlink(missing_ok=True)
        comm.barrier()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        if limit:
            self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """The training thread begins `phase` of `step`. All ranks go through the same phases."""
        now = time.monotonic()
        number, _, before, since = self._place
        if _judged(before):
            self._longest[before] = max(self._longest[before], now - since)
        self._place = (number + 1, step, phase, now)

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End; after an error, its words stay for the others."""
        self._over.set()
        if not self._limit:
            return
        self._thread.join()
        with contextlib.suppress(OSError):  # the folder may be what failed
            if error is not None:
                self._write(f"rank {self._rank} failed: {kind.__name__}: {error}")
                return
            self._file(self._rank).unlink(missing_ok=True)
            if self._rank == 0:
                self._folder.rmdir()  # the others' files may still be there

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}"

    def _write(self, failed: str = "") -> None:
        number, step, phase, since = self._place
        seconds = time.monotonic() - since
        late = _judged(phase) and phase in self._longest and seconds > self._limit + _SLACK * self._longest[phase]
        count = self._beat.count + 1 if self._beat else 1
        self._beat = Beat(count, number, step, phase, round(seconds, 1), late, failed[:_WORDS])
        said = json.dumps(self._beat, ensure_ascii=False).encode("utf-8", "replace").ljust(_BYTES)
        file = os.open(self._file(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, said, 0)  # who reads meanwhile may see no JSON, or two beats mixed, and looks again
        finally:
            os.close(file)  # NFS shows others what was written before

    def _live(self) -> None:
        """The thread."""
        every, woke = self._limit / _BEATS, time.monotonic()
        watched = [rank for rank in range(self._world) if rank != self._rank] if self._rank == 0 else [0]
        seen: dict[int, tuple[Beat | None, float]] = dict.fromkeys(watched, (None, woke))
        while not self._over.wait(every):
            now = time.monotonic()
            if now - woke > self._limit / 2:  # this process was suspended itself: the others may have been, too
                seen = {rank: (beat, now) for rank, (beat, _) in seen.items()}
                number, step, phase, _ = self._place
                self._place = (number, step, phase, now)
            woke = now
            with contextlib.suppress(OSError):  # a disk without room: the others see a count that stands still
                self._write()
            for rank in watched:
                with contextlib.suppress(OSError, ValueError):
                    beat = Beat(*json.loads(self._file(rank).read_text()))
                    if beat != seen[rank][0]:
                        seen[rank] = (beat, now)
            if problem := self._problem(seen, now):
                self._end(*problem)

    def _problem(self, seen: dict[int, tuple[Beat | None, float]], now: float) -> tuple[str, bool] | None:
        """What ends the job, and whether another rank has found it; None while all is well."""
        for beat, _ in seen.values():
            if beat is not None and beat.failed:
                return beat.failed, True
        for rank, (beat, since) in seen.items():
            if now - since > self._limit:
                where = f"last seen in {_where(beat)}" if beat else "never seen"
                return f"rank {rank} has stalled: no sign of life for {now - since:.0f} s, {where}", False
        if self._rank or self._beat is None:
            return None
        beats = {0: self._beat, **{rank: beat for rank, (beat, _) in seen.items() if beat is not None}}
        least = min(beat.place for beat in beats.values())
        behind = {rank: beat for rank, beat in beats.items() if beat.place == least}
        longest = max(behind.values(), key=lambda beat: beat.seconds)
        if _judged(longest.phase) and any(beat.late for beat in beats.values()):
            which = f"rank{'s' if len(behind) > 1 else ''} {', '.join(map(str, behind))}"
            return f"{which} stalled in {_where(longest)} for {longest.seconds:.0f} s", False
        return None

    def _end(self, problem: str, told: bool) -> None:
        """Leave the reason for the other ranks, say it unless another one has, and end this process."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self._write(problem)
        if told and self._over.wait(_LAST_WORDS):
            return  # this rank has come to its own end
        if not told or self._rank == 0:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        if self._beat is not None and self._beat.late:
            faulthandler.dump_traceback(file=sys.stderr)  # where the training thread hangs
        sys.stdout.flush()
        os._exit(EXIT_STALLED)


def _judged(phase: str) -> bool:
    return phase.removeprefix(WAITING) in PHASES


def _where(beat: Beat) -> str:
    return f"{beat.phase} of step {beat.step}" if beat.step else beat.phase
