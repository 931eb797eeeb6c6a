"""Decoding processes of one rank, as seen from the training process."""

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

from mmtrain.config.errors import DataError
from mmtrain.data.collate import PackArrays
from mmtrain.data.ordering import Planned
from mmtrain.data.reader import ReaderSpec, ReadPack, panels_of
from mmtrain.data.slots import SharedMemory
from mmtrain.data.wire import Channel, line_of

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package."""

IN_FLIGHT = 2
"""Packs that a worker has at most: while one answer is on its way, it decodes the next."""

AHEAD_BYTES = 32 << 10
"""A second pack whose message is longer waits for the first's answer: it might not fit into the socket while the worker
fills the other direction, and both would wait for ever."""


DEATH_SECONDS = 5.0
"""How long the exit code of a worker that has closed its socket is waited for."""


class _Job(NamedTuple):
    """A pack to decode, and who waits for it."""

    pack: Sequence[Planned]
    answer: Future[ReadPack]


class _Asked(NamedTuple):
    """A pack that a worker has."""

    pack: Sequence[Planned]
    answer: Future[ReadPack]
    memory: np.ndarray
    """Where it will lie."""


class _Worker(NamedTuple):
    """A decoding process."""

    process: subprocess.Popen[bytes]
    channel: Channel


class WorkerPool:
    """`workers` processes, each with one thread here that hands it packs and waits for what comes back."""

    def __init__(self, spec: ReaderSpec, workers: int, max_images: int) -> None:
        """Start the processes; they import neither torch nor the training script.

        `max_images`: of a pack.
        """
        self._shape = spec.shape
        self._memory = SharedMemory(PackArrays.nbytes(spec.shape, max_images))
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._all = [_start(spec, self._memory) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._all]
        for thread in self._threads:
            thread.start()

    def submit(self, pack: Sequence[Planned]) -> Future[ReadPack]:
        """Decode a pack in a process that has room for it; DataError if the index is wrong, or the process dies."""
        answer: Future[ReadPack] = Future()
        self._jobs.put(_Job(pack, answer))
        return answer

    def processes(self) -> list[int]:
        """Process ids."""
        return [worker.process.pid for worker in self._all]

    def _serve(self, worker: _Worker) -> None:
        """Life of a worker's thread: keep it busy, and pass on what it answers."""
        asked: deque[_Asked] = deque()
        while True:
            if len(asked) < IN_FLIGHT:
                try:
                    job = self._jobs.get(block=not asked)
                except Empty:
                    pass
                else:
                    if job is None:
                        while asked:
                            self._pass_on(worker, asked.popleft())
                        return
                    try:
                        self._ask(worker, asked, *job)
                    except Exception as error:  # whatever it is: nobody may wait for ever
                        job.answer.set_exception(error)
                    del job  # or its pack would live until the next one comes
                    continue
            self._pass_on(worker, asked.popleft())

    def _ask(self, worker: _Worker, asked: deque[_Asked], pack: Sequence[Planned], answer: Future[ReadPack]) -> None:
        """Send a pack to a worker."""
        try:
            slot, memory = self._memory.take()
        except OSError as error:
            raise DataError(
                f"no memory for another pack of {self._memory.slot_bytes} bytes that workers decode into ({error}); "
                "lower data.workers or data.max_images"
            ) from None
        line = line_of([slot, pack])
        while asked and len(line) > AHEAD_BYTES:
            self._pass_on(worker, asked.popleft())
        with suppress(OSError):  # it is dead, as waiting for its answer will show
            worker.channel.send_line(line)
        asked.append(_Asked(pack, answer, memory))

    def _pass_on(self, worker: _Worker, asked: _Asked) -> None:
        """Give the worker's next answer to who waits for it."""
        try:
            asked.answer.set_result(self._answer(worker, asked.pack, asked.memory))
        except Exception as error:  # whatever it is: nobody may wait for ever
            asked.answer.set_exception(error)

    def _answer(self, worker: _Worker, pack: Sequence[Planned], memory: np.ndarray) -> ReadPack:
        """The worker's next answer; DataError if it says so, or is dead."""
        try:
            found = worker.channel.receive()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):  # its socket closes a little before its end
                worker.process.wait(DEATH_SECONDS)
            samples = ", ".join(f"{planned.index} sample {planned.row}" for planned in pack[:4])
            raise DataError(
                f"a decoding process (pid {worker.process.pid}) died with exit code {worker.process.poll()} on a pack "
                f"of {len(pack)} samples ({samples}, ...); if the machine ran out of memory, lower data.workers"
            ) from None
        if "error" in found:
            raise DataError(found["error"])
        if "defect" in found:
            raise RuntimeError(f"decoding failed in another process:\n{found['defect']}")
        arrays = PackArrays.within(memory, self._shape, panels_of(pack))
        return ReadPack(arrays.holding(found["images"], found["keys"]), found["ledger"])

    def close(self) -> None:
        """End the processes, which hold nothing that could be lost. Once more does nothing."""
        workers, self._all = self._all, []
        for worker in workers:
            worker.process.kill()
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for worker in workers:
            worker.process.wait()
            worker.channel.close()
        if workers:
            self._memory.close()


def _start(spec: ReaderSpec, memory: SharedMemory) -> _Worker:
    """One decoding process, told what to do."""
    ours, theirs = socket.socketpair()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One core each: more processes are the way to more cores.
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    # glibc gives a picture's memory back as soon as it is freed, and fetching it anew takes longer than to decode some.
    memory_kept = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
    numbers = [theirs.fileno(), memory.descriptor, memory.slot_bytes, os.getpid()]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmtrain.data.worker", *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), memory.descriptor],
            env={**os.environ, **threads, **memory_kept, "PYTHONPATH": os.pathsep.join(paths)},
        )
    channel = Channel(ours)
    channel.send(asdict(spec))
    return _Worker(process, channel)
