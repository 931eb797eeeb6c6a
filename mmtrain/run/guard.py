"""When to leave a step out, when to go back, and when to stop: for people, schedulers and numbers.

A job is told to stop by SIGTERM, by SIGUSR1 (SLURM: `--signal=USR1@300`), by a file OUT/stop, or by a deadline:
MMTRAIN_DEADLINE holds a Unix time in seconds, e.g. `export MMTRAIN_DEADLINE=$((SLURM_JOB_END_TIME - 300))`. Signals may
reach one rank alone (launchers end ranks one after another), so the ranks agree on `StopFlag.code` in every step
(mmtrain.totals.StepSums). A run that is told before its first step takes that step, saves, and ends.
"""

import math
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mmtrain.config import schema
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

    Rank 0 alone looks for the stop file. One left by an earlier run is removed here, because it has done its work: by a
    job that holds the run's lock, or the file may be meant for another (fresh=False: workers share their folder).
    A flag inside another's, a trial in its worker, tells that one of signals too.
    """

    def __init__(self, run_dir: Path, rank: int = 0, fresh: bool = True):
        self._file = run_dir / STOP_FILE
        self._looks = rank == 0  # another rank might see an old file before rank 0 has removed it
        if self._looks and fresh:
            self._file.unlink(missing_ok=True)
        self._deadline = _deadline()
        self._signal = 0
        self._before = {number: signal.signal(number, self._caught) for number in _SIGNALS}

    def _caught(self, number: int, _: FrameType | None) -> None:
        self._signal = max(self._signal, _SIGNALS[signal.Signals(number)])
        outer = getattr(self._before[signal.Signals(number)], "__self__", None)
        if isinstance(outer, StopFlag):
            outer._caught(number, None)

    def code(self) -> int:
        """This rank's reason, 0 for none. The maximum over ranks is the run's."""
        if self._looks and os.path.exists(self._file):  # noqa: PTH110 - Path's would raise where a disk fails
            return 4
        return self._signal or (3 if time.time() >= self._deadline else 0)

    def __enter__(self) -> "StopFlag":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    """Decides, from numbers that all ranks share, whether an update may be applied, and whether to go back.

    options      the recipe's guard section
    state        `as_json` of the guard whose run goes on
    skips        unusable steps so far; those left out on purpose, or without anything to learn from, do not count
    rollbacks    times that the weights went back to a checkpoint
    """

    def __init__(self, options: schema.Guard, state: Mapping[str, Any] | None = None):
        state = state or {}
        self._options = options
        self.skips: int = state.get("skips", 0)
        self.rollbacks: int = state.get("rollbacks", 0)
        self._row: list[int] = list(state.get("row", []))
        self._before: int = state.get("before", 0)
        self._usable: deque[list[float]] = deque(state.get("usable", []), options.spike_window)

    def as_json(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {
            "skips": self.skips,
            "rollbacks": self.rollbacks,
            "row": list(self._row),
            "before": self._before,
            "usable": [list(pair) for pair in self._usable],
        }

    def judge(
        self, step: int, loss: float, grad_norm: float, label_weight: float, pack_keys: Sequence[Sequence[str]]
    ) -> str:
        """Why step `step` is to be skipped; empty to apply it. Loss, norm and label weight are the global batch's.

        pack_keys: samples of this rank's packs. TrainingStopped when that is one skip too many.
        """
        if step in self._options.skip_steps:
            return "listed in guard.skip_steps"
        if label_weight == 0:
            return "no label in the global batch"
        wrong = self._wrong({"loss": loss, "gradient norm": grad_norm})
        if not wrong:
            self._usable.append([loss, grad_norm])
            self._row, self._before = [], 0
            return ""
        self.skips += 1
        self._row.append(step)
        if self.skips > self._options.max_skips:
            keys = shortened([key for pack in pack_keys for key in pack], 8)
            raise TrainingStopped(
                f"step {step}: {' and '.join(wrong)}; that is unusable step {self.skips} of this run, guard.max_skips "
                f"is {self._options.max_skips}. Samples of the step: {keys}. Lower optim.lr (and name it "
                "in resume_allow), look at these samples, or go on from the last checkpoint with guard.skip_steps."
            )
        return " and ".join(wrong)

    def _wrong(self, numbers: Mapping[str, float]) -> list[str]:
        """What is not finite, or a spike against the usable steps before."""
        wrong = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
        factor, window = self._options.spike, self._options.spike_window
        if wrong or not factor or len(self._usable) < window:
            return wrong
        for (name, value), seen in zip(numbers.items(), zip(*self._usable, strict=True), strict=True):
            median = statistics.median(seen)
            if value > factor * median:
                wrong.append(f"{name} {value:.4g} above {factor:g} times {median:.4g}, the median of {window} steps")
        return wrong

    def go_back_before(self, step: int) -> int:
        """Step that the weights must be older than, if `step` made a row of unusable steps long enough; else 0.

        TrainingStopped when the run went back often enough.
        """
        after = self._options.rollback_after
        if not after or step not in self._row[-1:] or len(self._row) % after:
            return 0
        if self.rollbacks >= self._options.max_rollbacks:
            raise TrainingStopped(
                f"steps {self._row[0]} to {self._row[-1]} were unusable, after the weights went back "
                f"{self.rollbacks} times; guard.max_rollbacks is {self._options.max_rollbacks}. Lower optim.lr "
                "(and name it in resume_allow), or start from an older checkpoint."
            )
        return self._before or self._row[0]

    def went_back(self, to: int) -> None:
        """The weights are those of step `to` again. Should the next step be no better, they must be older still."""
        self.rollbacks += 1
        self._row, self._before = [], to
        self._usable.clear()
