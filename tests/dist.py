"""Run a function on several gloo ranks, each a process with its own port, one thread and a hard time limit.

The ranks are forked from a server that has imported the engines once: importing them on 8 ranks takes longer than
most tests. `fresh=True` starts an interpreter for each rank instead, as a launcher does.
"""

import ctypes
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.parallel.environment import free_port

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankError(AssertionError):
    """A rank ended with an error; the message holds what it printed."""


class Rank(NamedTuple):
    """One process."""

    pid: int
    poll: Callable[[], int | None]
    """The exit code; None while it runs."""


def run(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    limit: float = 240.0,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    watch: Callable[[], float] | None = None,
) -> list[Any]:
    """function(*arguments) in `world` processes; their return values by rank.

    function   defined at the top of an importable module.
    arguments  and return values go through pickle.
    limit      seconds until all ranks are killed; with `watch`, seconds after the time.monotonic() that it returns.
    RankError  when a rank raises, dies, or the limit passes: with the output of the rank that failed first.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        port = free_port()
        start = _start_fresh if fresh else _fork
        ranks = [start(task, rank, _environment(rank, world, port, env or {})) for rank in range(world)]
        began = time.monotonic()
        try:
            _wait(ranks, watch or (lambda: began), limit, task)
        finally:
            for rank in ranks:
                _kill(rank)
        return [pickle.loads(_file(task, rank, "result").read_bytes()) for rank in range(world)]


def _environment(rank: int, world: int, port: int, env: dict[str, str]) -> dict[str, str]:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {key: str(value) for key, value in place.items()} | SETTINGS | env


def _file(task: Path, rank: int, what: str) -> Path:
    return task.with_name(f"{what}.{rank}")


def _start_fresh(task: Path, rank: int, env: dict[str, str]) -> Rank:
    with _file(task, rank, "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist", str(task), str(rank)],
            cwd=ROOT,
            env=os.environ | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Rank(process.pid, process.poll)


def _fork(task: Path, rank: int, env: dict[str, str]) -> Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engines"])
    # The server starts with the first rank, from the folder and with the settings of that moment.
    before, folder = {key: os.environ.get(key) for key in SETTINGS}, Path.cwd()
    os.environ.update(SETTINGS)
    os.chdir(ROOT)
    try:
        process = context.Process(target=_forked, args=(task, rank, os.environ | env))
        process.start()
    finally:
        os.chdir(folder)
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    return Rank(process.pid, lambda: process.exitcode)


def _forked(task: Path, rank: int, env: dict[str, str]) -> None:
    """On a forked rank: what `_start_fresh` asks of the operating system, then the function."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    log = os.open(_file(task, rank, "log"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _main(task, rank)


def _wait(ranks: list[Rank], since: Callable[[], float], limit: float, task: Path) -> None:
    """Return when all ranks ended well; RankError on the first that did not."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise RankError(f"rank {failed[0]} ended with code {codes[failed[0]]}:\n{_log(task, failed[0])}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > since() + limit:
            alive = [rank for rank, code in enumerate(codes) if code is None]
            logs = "\n".join(f"--- rank {rank}\n{_log(task, rank)}" for rank in alive)
            raise RankError(f"ranks {alive} still ran after {limit:.0f} s:\n{logs}")
        time.sleep(0.02)


def _log(task: Path, rank: int) -> str:
    path = _file(task, rank, "log")
    return path.read_text(errors="replace")[-6000:] if path.exists() else ""


def _kill(rank: Rank) -> None:
    """End the rank and the processes that it started, if they still run."""
    if rank.poll() is None:
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:  # a forked rank that has no session of its own yet
            os.kill(rank.pid, signal.SIGKILL)
        while rank.poll() is None:
            time.sleep(0.01)


def _main(task: Path, rank: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives a test run that is killed
    module, name, arguments = pickle.loads(task.read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    _file(task, rank, "result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
