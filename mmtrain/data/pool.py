"""Decoding processes of one rank, as seen from the training process."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from mmtrain.config.errors import DataError
from mmtrain.data.ordering import Planned
from mmtrain.data.reader import ReaderSpec, ReadPack
from mmtrain.data.wire import receive

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package."""


class _Worker(NamedTuple):
    process: subprocess.Popen[bytes]
    connection: Connection


class WorkerPool:
    """`workers` processes, each with one thread here that hands it packs and waits for what comes back."""

    def __init__(self, spec: ReaderSpec, workers: int) -> None:
        """Start the processes; they import neither torch nor the training script."""
        self._all = [_start(spec) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def submit(self, pack: Sequence[Planned]) -> Future[ReadPack]:
        """Decode a pack in the next idle process."""
        return self._threads.submit(self._ask, pack)

    def processes(self) -> list[int]:
        """Process ids."""
        return [worker.process.pid for worker in self._all]

    def _ask(self, pack: Sequence[Planned]) -> ReadPack:
        """One pack's journey through a worker."""
        worker = self._idle.get()
        try:
            worker.connection.send(pack)
            answer = receive(worker.connection)
        except (EOFError, OSError):
            samples = ", ".join(f"{planned.index} sample {planned.row}" for planned in pack[:4])
            raise DataError(
                f"a decoding process (pid {worker.process.pid}) died with exit code {worker.process.poll()} on a pack "
                f"of {len(pack)} samples ({samples}, ...); if the machine ran out of memory, lower data.workers"
            ) from None
        finally:
            self._idle.put(worker)
        if isinstance(answer, DataError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"decoding failed in another process:\n{answer}")
        return answer

    def close(self) -> None:
        """End the processes, which hold nothing that could be lost."""
        for worker in self._all:
            worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.process.wait()
            worker.connection.close()


def _start(spec: ReaderSpec) -> _Worker:
    """One decoding process, told what to do."""
    ours, theirs = socket.socketpair()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One core each: more processes are the way to more cores.
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmtrain.data.worker", str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        )
    connection = Connection(ours.detach())
    connection.send(spec)
    return _Worker(process, connection)
