"""Faults inside a rank: functions of mmtrain are wrapped from outside, then the real command runs.

Every rank of a job calls `command`; the fault happens on one of them, once, in one step. What comes from outside a
process (signals at any time, damage to files between two starts) is in tests.faults.job.
"""

import errno
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import mmtrain.watch
from mmtrain.model.stepio import Losses
from mmtrain.parallel.engine import Engine
from mmtrain.run import retain, saver
from mmtrain.run.heartbeat import Heartbeat
from tests.train import tasks

SPIKE = 1e4
SLOW = 1.0  # seconds that a slow disk takes more for a file


class Fault(NamedTuple):
    """What happens, where and when."""

    kind: str
    """A key of IN_PHASE, IN_NUMBERS or IN_SAVE."""
    rank: int
    step: int
    """Faults of a save hit the first one of this step or later."""
    phase: str = ""
    """One of mmtrain.run.metrics.PHASES, for the kinds of IN_PHASE."""
    steps: int = 1
    """Steps that it lasts, for the kinds of IN_NUMBERS."""


def command(fault: Fault | None, arguments: list[str]) -> None:
    """`python launch/train.py ARGUMENTS` on a rank, with a fault. Without plots, which cost more than the training."""
    mmtrain.watch.draw_plots = lambda *_: []
    if fault is not None and int(os.environ["RANK"]) == fault.rank:
        if fault.kind in IN_PHASE:
            _in_phase(fault, IN_PHASE[fault.kind])
        elif fault.kind in IN_NUMBERS:
            IN_NUMBERS[fault.kind](_reached(fault))
        else:
            _in_save(fault, IN_SAVE[fault.kind])
    tasks.command("train", arguments)


# ---- in a phase of a step


def _fail() -> None:
    raise RuntimeError("injected: a defect on one rank")


def _send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _kill_worker() -> None:
    workers = [child for child in psutil.Process().children() if "mmtrain.data.worker" in child.cmdline()]
    assert workers, "the recipe has no decoding process"
    workers[0].kill()


IN_PHASE: dict[str, Callable[[], None]] = {
    "exception": _fail,
    "hang": lambda: time.sleep(3600),
    "worker killed": _kill_worker,
    **{name: _send(getattr(signal, name)) for name in ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGUSR1")},
}


def _in_phase(fault: Fault, act: Callable[[], None]) -> None:
    """Do `act` when the phase begins for the first time."""
    at, left = Heartbeat.at, [act]

    def reached(self: Heartbeat, step: int, phase: str) -> None:
        at(self, step, phase)
        if left and (step, phase) == (fault.step, fault.phase):
            left.pop()()

    Heartbeat.at = reached


# ---- in the numbers of a step


def _reached(fault: Fault) -> Callable[[], bool]:
    """Whether training is in one of the fault's steps."""
    at, now = Heartbeat.at, [0]

    def reached(self: Heartbeat, step: int, phase: str) -> None:
        at(self, step, phase)
        now[0] = step

    Heartbeat.at = reached
    return lambda: fault.step <= now[0] < fault.step + fault.steps


def _scaled_loss(factor: float) -> Callable[[Callable[[], bool]], None]:
    def arm(hit: Callable[[], bool]) -> None:
        forward = Engine.forward

        def scaled(self: Engine, *arguments: Any) -> Losses:
            losses = forward(self, *arguments)
            if not hit():
                return losses
            return losses._replace(total=losses.total * factor, by_source_sum=losses.by_source_sum * factor)

        Engine.forward = scaled

    return arm


def _nan_gradient(hit: Callable[[], bool]) -> None:
    """One element of one gradient on this rank, between the last backward and the norm."""
    norms = Engine.norms

    def poisoned(self: Engine, *probe: Any) -> Any:
        if hit():
            _, gradient = next(iter(self._state.gradients()))
            gradient.view(-1)[0] = math.nan
        return norms(self, *probe)

    Engine.norms = poisoned


IN_NUMBERS: dict[str, Callable[[Callable[[], bool]], None]] = {
    "NaN in loss": _scaled_loss(math.nan),
    "NaN in one gradient": _nan_gradient,
    "spike": _scaled_loss(SPIKE),
}


# ---- in a save


def _full(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _die_in_file(path: Path) -> None:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def _die(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


IN_SAVE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "disk full": ("file", _full),
    "slow disk": ("file", lambda _: time.sleep(SLOW)),
    "killed in a file": ("file", _die_in_file),
    "killed before the rename": ("rename", _die),
    "killed before the clean-up": ("clean-up", _die),
}
"""Kind -> where in the save, and what happens; only rank 0 renames and cleans up."""


def _in_save(fault: Fault, what: tuple[str, Callable[[Path], None]]) -> None:
    """Do `act` in the first save of the fault's step or a later one."""
    where, act = what
    left = [act]

    def hit(step: int, path: Path) -> None:
        if left and step >= fault.step:
            left.pop()(path)

    write, seal, clean = saver.write_shard, saver.seal, retain.remove_surplus

    def write_shard(path: Path, pieces: Any) -> Any:
        hit(int(path.parent.name[5:13]), path)
        return write(path, pieces)

    def seal_and_rename(tmp: Path, step: int, *rest: Any) -> Path:
        sync = saver.sync_folder

        def synced(folder: Path) -> None:
            sync(folder)
            if folder == tmp:  # everything is on disk; the rename comes next
                hit(step, folder)

        saver.sync_folder = synced
        return seal(tmp, step, *rest)

    def remove_surplus(run_dir: Path, current: int, *rest: Any) -> None:
        hit(current, run_dir)
        clean(run_dir, current, *rest)

    if where == "file":
        saver.write_shard = write_shard
    elif where == "rename":
        saver.seal = seal_and_rename
    else:
        retain.remove_surplus = remove_surplus
