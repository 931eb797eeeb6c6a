"""A job of several ranks as a launcher keeps it: start, wait, end all when one has failed, start again."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmtrain.config.load import dump
from mmtrain.config.schema import Checkpoint, Guard, Parallel, Recipe
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.parallel.environment import free_port
from tests.faults import inject
from tests.faults.inject import Fault
from tests.train import jobs, tiny

WORLD, STEPS, EVERY = 2, 10, 3
STALL = 6.0
"""guard.stall_seconds of the runs that stall; a machine that is busy with other tests may delay any process."""
TERM, GRACE = 3.0, 60.0
"""Seconds after which the launcher sends SIGTERM, and SIGKILL, to the other ranks when one has failed.

Training ranks take SIGTERM for a request to stop. One that must be killed in the end hangs, unless it was stopped.
"""
LIMIT = 240.0
"""Seconds after which a job is taken for hanging."""
SPIKE_WINDOW = 3


class Signal(NamedTuple):
    """A signal from outside."""

    number: int
    rank: int
    seconds: float
    """After the start, or after the signs."""
    signs: tuple[Path, ...] = ()
    """Files that must have been there before the seconds count."""


class Attempt(NamedTuple):
    """One start of the command."""

    codes: list[int]
    """Exit codes by rank; negative for a signal."""
    seconds: float
    """From the start until the last rank had ended."""
    log: str
    """What all ranks printed."""
    hung: bool
    """Whether a rank had to be killed, other than one that was stopped by SIGSTOP."""


def recipe(
    shards: Path,
    out: Path,
    tokenizer: Tokenizer,
    workers: int = 0,
    skip_steps: Sequence[int] = (),
    stall: float = 60.0,
) -> Recipe:
    """Experts in all parts over two ranks, gradients sharded, both ways of balancing."""
    stage = tiny.recipe(
        shards,
        out,
        tokenizer,
        steps=STEPS,
        model=tiny.sparse_model(),
        parallel=Parallel(zero_stage=2, expert=2),
        checkpoint=Checkpoint(every=EVERY, keep_last=2),
        guard=Guard(spike=50.0, spike_window=SPIKE_WINDOW, stall_seconds=stall, skip_steps=list(skip_steps)),
    )
    return tiny.with_workers(stage, workers)


def attempt(recipe: Recipe, logs: Path, fault: Fault | None = None, sent: Signal | None = None) -> Attempt:
    """Start the command once on WORLD ranks and wait until all have ended."""
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.glob("*.rank0")))
    file = logs / "recipe.yaml"
    file.write_text(dump(recipe))
    where = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    start = time.monotonic()
    ranks = [
        jobs.Job(
            logs / f"{number}.rank{rank}",
            inject.command,
            fault,
            [str(file)],
            env={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(WORLD)
    ]
    hung = _wait([rank.process for rank in ranks], start, sent)
    seconds = time.monotonic() - start
    ended = [rank.end() for rank in ranks]
    return Attempt([end.code for end in ended], seconds, "\n".join(end.log for end in ended), hung)


def _wait(processes: list, start: float, sent: Signal | None) -> bool:
    """Until all have ended; whether any had to be killed that could have ended by itself."""
    failed, told, left, hung = None, False, sent, False
    signs, since = list(sent.signs) if sent else [], start
    while alive := [process for process in processes if process.exitcode is None]:
        now = time.monotonic()
        while signs and signs[0].exists():
            signs.pop(0)
            since = now
        if left is not None and not signs and now - since >= left.seconds:
            _send(processes[left.rank : left.rank + 1], left.number)
            left = None
        if failed is None and any(process.exitcode for process in processes):
            failed = now
        if failed is not None and not told and now - failed > TERM:
            _send(alive, signal.SIGTERM)
            told = True
        stopped = failed is not None and all(_is_stopped(process.pid) for process in alive)
        if stopped or now - start > LIMIT or (failed is not None and now - failed > GRACE):
            hung |= not stopped
            _send(alive, signal.SIGKILL)
        time.sleep(0.02)
    return hung


def _send(processes: list, number: int) -> None:
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, number)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def until_done(recipe: Recipe, logs: Path, most: int = 3) -> list[Attempt]:
    """The same command again and again until it has done all steps, at most `most` times."""
    attempts: list[Attempt] = []
    while len(attempts) < most and (not attempts or any(attempts[-1].codes)):
        attempts.append(attempt(recipe, logs))
    return attempts
