"""What the jobs of these tests do, each in a process of its own."""

import os
import signal
from pathlib import Path
from typing import Any

import launch.entry
import mmtrain.sweep.trial
from mmtrain.sweep.spec import read_sweep
from mmtrain.sweep.study import Study
from mmtrain.sweep.worker import work
from mmtrain.watch import Watch


def worked(file: Path) -> int:
    """A worker's exit code."""
    launch.entry.setup()
    mmtrain.sweep.trial.LOOK_SECONDS = 0.02
    sweep = read_sweep(file)
    return work(sweep, Study(sweep), lambda: None)


def worked_until(file: Path, trial: int, step: int) -> int:
    """The same; SIGTERM reaches it in `step` of `trial`."""
    report = Watch.report

    def reported(self: Watch, number: int, *rest: Any) -> None:
        report(self, number, *rest)
        if number == step and self._recipe.out.endswith(f"{trial:04d}"):
            os.kill(os.getpid(), signal.SIGTERM)

    Watch.report = reported
    return worked(file)
