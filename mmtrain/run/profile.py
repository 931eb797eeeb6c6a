"""`--profile A:B`: a torch profiler trace of steps A to B (from 1, both included) in OUT/profile."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mmtrain.config.errors import ConfigError


class ProfileWindow:
    """Writes OUT/profile/rank_00000.json, one file a rank, for chrome://tracing or ui.perfetto.dev."""

    def __init__(self, text: str, run_dir: Path, rank: int = 0):
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"--profile {text}: not a window of steps. Write FIRST:LAST, e.g. --profile 3:5")
        self.first, self.last = int(match[1]), int(match[2])
        self.path = run_dir / "profile" / f"rank_{rank:05d}.json"
        self._profile: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wrap one step; outside the window this does nothing."""
        if not self.first <= step <= self.last:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        with record_function(f"step {step}"):
            yield
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Write the trace, also of a window that a stop cut short."""
        if self._profile is not None:
            self._profile.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self.path))
            self._profile = None
