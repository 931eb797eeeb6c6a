"""When to leave a step out, and when to stop: for people, schedulers and numbers.

A job is told to stop by SIGTERM, by SIGUSR1 (SLURM: `--signal=USR1@300`), by a file OUT/stop, or by a deadline:
MMTRAIN_DEADLINE holds a Unix time in seconds, e.g. `export MMTRAIN_DEADLINE=$((SLURM_JOB_END_TIME - 300))`. Signals may
reach one rank alone (launchers end ranks one after another), so the ranks agree on `StopFlag.code` in every step
(mmtrain.totals.StepSums).
"""

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mmtrain.config.errors import ConfigError, UserError
from mmtrain.run.manifest import shortened

EXIT_REQUEUE = 75
"""Exit code after a stop from outside: everything is saved, run the same command again (EX_TEMPFAIL)."""
EXIT_STOPPED = 76
"""Exit code after a stop file: saved, and a person did not want it to go on. A scheduler does not requeue."""

STOP_FILE = "stop"
DEADLINE = "MMTRAIN_DEADLINE"

_REASONS = ("", "SIGTERM", "SIGUSR1", f"{DEADLINE} has passed", f"the file {STOP_FILE} in the run folder")
_SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 2}


class TrainingStopped(UserError, RuntimeError):
    """Too many steps could not be used."""


class StopFlag:
    """Watches for reasons to stop. Made in the main thread; handlers stay until `close`.

    Rank 0 alone looks for the stop file. One left by an earlier run is removed here, because it has done its work.
    """

    def __init__(self, run_dir: Path, rank: int = 0):
        self._file = run_dir / STOP_FILE
        self._looks = rank == 0  # another rank might see an old file before rank 0 has removed it
        if self._looks:
            self._file.unlink(missing_ok=True)
        self._deadline = _deadline()
        self._signal = 0
        self._before = {number: signal.signal(number, self._caught) for number in _SIGNALS}

    def _caught(self, number: int, _: FrameType | None) -> None:
        self._signal = max(self._signal, _SIGNALS[signal.Signals(number)])

    def code(self) -> int:
        """This rank's reason, 0 for none. The maximum over ranks is the run's."""
        if self._looks and self._file.exists():
            return 4
        return self._signal or (3 if time.time() >= self._deadline else 0)

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _deadline() -> float:
    text = os.environ.get(DEADLINE, "")
    try:
        return float(text or "inf")
    except ValueError:
        raise ConfigError(
            f"{DEADLINE}={text!r} is not a Unix time in seconds; e.g. $((SLURM_JOB_END_TIME - 300))"
        ) from None


def stop_reason(code: int) -> str:
    """Words for a code."""
    return _REASONS[code]


def exit_code(code: int) -> int:
    """Exit code of a run that stopped for this reason."""
    return EXIT_STOPPED if code == 4 else EXIT_REQUEUE


class Guard:
    """Decides, from numbers that all ranks share, whether an update may be applied.

    max_skips    unusable steps of a run at most
    skip_steps   steps that are left out on purpose; they do not count
    skips        unusable steps so far (from the checkpoint)
    """

    def __init__(self, max_skips: int, skip_steps: Sequence[int] = (), skips: int = 0):
        self.max_skips, self.skip_steps, self.skips = max_skips, frozenset(skip_steps), skips

    def judge(
        self, step: int, loss: float, grad_norm: float, label_weight: float, pack_keys: Sequence[Sequence[str]]
    ) -> str:
        """Why step `step` is to be skipped; empty to apply it. Loss, norm and label weight are the global batch's.

        pack_keys: samples of this rank's packs. TrainingStopped when that is one skip too many; a step that is left
        out on purpose, or that has nothing to learn from, does not count.
        """
        if step in self.skip_steps:
            return "listed in guard.skip_steps"
        if label_weight == 0:
            return "no label in the global batch"
        numbers = {"loss": loss, "gradient norm": grad_norm}
        wrong = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if not wrong:
            return ""
        self.skips += 1
        if self.skips > self.max_skips:
            keys = shortened([key for pack in pack_keys for key in pack], 8)
            raise TrainingStopped(
                f"step {step}: {' and '.join(wrong)}; that is unusable step {self.skips} of this run, guard.max_skips "
                f"is {self.max_skips}. Samples of the step: {keys}. Lower optim.lr, look at these "
                "samples, or go on from the last checkpoint with guard.skip_steps."
            )
        return " and ".join(wrong)
