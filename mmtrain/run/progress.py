"""What a person sees while training: a bar in a terminal, lines elsewhere."""

import time
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmtrain.run.metrics import StepRecord


class ProgressLog:
    """Rank 0's. `update` in every step moves the bar; `report` shows the numbers of a logged step.

    stream   where to write (None: standard output); a bar only if it is a terminal
    """

    def __init__(self, name: str, total_steps: int, done: int = 0, stream: TextIO | None = None):
        self._name, self._total, self._done = name, total_steps, done
        self._start = time.monotonic()
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}  ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(name, total=total_steps, completed=done, numbers="")
            self._bar.start()

    def update(self, step: int) -> None:
        """Step `step` is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, record: StepRecord) -> None:
        """Show a logged step."""
        numbers = _numbers(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, numbers=numbers)
            return
        text = f"{self._name}  step {record.step}/{self._total}  {numbers}  ETA {self._eta(record.step)}"
        self._console.print(text, markup=False)

    def _eta(self, step: int) -> str:
        """Time left at this run's mean speed."""
        seconds = (time.monotonic() - self._start) / max(step - self._done, 1) * (self._total - step)
        return str(timedelta(seconds=round(seconds)))

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()


def _numbers(record: StepRecord) -> str:
    """The numbers of a line."""
    words = [
        f"loss {record.language_loss:.4f}",
        f"norm {record.grad_norm:.3g}",
        f"{record.rates.tokens_per_second:,.0f} tokens/s",
        f"{record.rates.images_per_second:,.1f} images/s",
    ]
    if "all" in record.held_out:
        words.insert(1, f"held-out {record.held_out['all']:.4f}")
    if record.rates.mfu is not None:
        words.append(f"MFU {record.rates.mfu:.1%}")
    if record.skipped:
        words.append(f"SKIPPED: {record.skipped}")
    return "  ".join(words)
