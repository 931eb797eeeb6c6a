"""Run a function on several gloo ranks, each a fresh process with its own port, one thread and a hard time limit."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.parallel.environment import free_port

ROOT = Path(__file__).resolve().parents[1]


class RankError(AssertionError):
    """A rank ended with an error; the message holds what it printed."""


def run(
    function: Callable[..., Any], world: int, *arguments: Any, limit: float = 240.0, env: dict[str, str] | None = None
) -> list[Any]:
    """function(*arguments) in `world` processes; their return values by rank.

    function   defined at the top of an importable module.
    arguments  and return values go through pickle.
    limit      seconds until all ranks are killed.
    RankError  when a rank raises, dies, or the limit passes: with the output of the rank that failed first.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        port = free_port()
        ranks = [_start(rank, world, port, task, env or {}) for rank in range(world)]
        try:
            _wait(ranks, time.monotonic() + limit, limit, task)
        finally:
            for rank in ranks:
                _kill(rank)
        return [pickle.loads(_file(task, rank, "result").read_bytes()) for rank in range(world)]


def _file(task: Path, rank: int, what: str) -> Path:
    return task.with_name(f"{what}.{rank}")


def _start(rank: int, world: int, port: int, task: Path, env: dict[str, str]) -> subprocess.Popen:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in place.items()}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **env}
    with _file(task, rank, "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.dist", str(task), str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen], deadline: float, limit: float, task: Path) -> None:
    """Return when all ranks ended well; RankError on the first that did not."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise RankError(f"rank {failed[0]} ended with code {codes[failed[0]]}:\n{_log(task, failed[0])}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, code in enumerate(codes) if code is None]
            logs = "\n".join(f"--- rank {rank}\n{_log(task, rank)}" for rank in alive)
            raise RankError(f"ranks {alive} still ran after {limit:.0f} s:\n{logs}")
        time.sleep(0.02)


def _log(task: Path, rank: int) -> str:
    return _file(task, rank, "log").read_text(errors="replace")[-6000:]


def _kill(rank: subprocess.Popen) -> None:
    """End the rank and the processes that it started, if they still run."""
    if rank.poll() is None:
        os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def _main(task: Path, rank: int) -> None:
    import importlib

    module, name, arguments = pickle.loads(task.read_bytes())
    result = getattr(importlib.import_module(module), name)(*arguments)
    _file(task, rank, "result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
