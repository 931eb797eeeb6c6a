"""Run functions in fresh processes that have everything imported already: forks of one server, a few ms each.

Importing DeepSpeed takes longer than a whole training here does. A job is a real process: it may be killed, may end
by os._exit, and leaves nothing behind in the tests' own process.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.parallel.environment import free_port

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 200.0
"""Seconds until a job is killed."""

SERVER = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "DS_LOG_LEVEL": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}


class Ended(NamedTuple):
    """How a job ended."""

    code: int
    """Exit code; the negative number of the signal that killed it."""
    value: Any
    """What the function returned; None when it did not return."""
    log: str
    """What it printed, standard error included."""


class Job:
    """function(*arguments) in a process of its own. The function is defined at the top of an importable module."""

    def __init__(
        self, log: Path, function: Callable[..., Any], *arguments: Any, env: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        log.touch()  # the process may be killed before it opens it
        self._mine, theirs = multiprocessing.Pipe(duplex=False)
        self.process: BaseProcess = _context().Process(
            target=_child, args=(function, arguments, dict(env or {}), log, theirs)
        )
        with _environment(SERVER):
            self.process.start()
        theirs.close()

    def end(self) -> Ended:
        """Wait for it."""
        value = None
        try:
            if self._mine.poll(LIMIT):
                value = self._mine.recv()
        except EOFError:
            pass  # it was killed, or left by os._exit
        self.process.join(20.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.process.close()
        self._mine.close()
        return Ended(code, value, self._log.read_text(errors="replace"))


def run(folder: Path, function: Callable[..., Any], *arguments: Any) -> Ended:
    """One job from beginning to end."""
    folder.mkdir(parents=True, exist_ok=True)
    return Job(folder / "log", function, *arguments).end()


def run_ranks(folder: Path, world: int, function: Callable[..., Any], *arguments: Any) -> list[Ended]:
    """The same on `world` ranks, placed as torchrun places them."""
    folder.mkdir(parents=True, exist_ok=True)
    where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    jobs = [Job(folder / f"log{rank}", function, *arguments, env=place) for rank, place in enumerate(places)]
    return [job.end() for job in jobs]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.tasks"])
    return context


class _environment:
    """These variables inside a `with`, for a server that is started there."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = dict(os.environ)
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


def _child(function: Callable[..., Any], arguments: tuple, env: dict[str, str], log: Path, answer: Connection) -> None:
    """In the new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # what the parent gave the server was meant for Python's own streams
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - a descriptor, kept to the end
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(SERVER | env)
    os.chdir(ROOT)
    try:
        answer.send(function(*arguments))
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
