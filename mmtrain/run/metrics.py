"""metrics.jsonl: one JSON object a logged step, and the meter that its rates come from.

Losses, norms and shares are those of the step itself, so that the curve of an interrupted run is the curve of an
undisturbed one; rates and times are means over the steps since the line before.
"""

import json
import logging
import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

log = logging.getLogger("mmtrain.run")

NAME = "metrics.jsonl"

Phase = Literal["data_wait", "forward", "backward", "update"]
PHASES: tuple[Phase, ...] = ("data_wait", "forward", "backward", "update")


@dataclass(frozen=True)
class Rates:
    """What the meter measured; all ranks' tokens and images, this rank's times."""

    tokens_per_second: float = 0.0
    """Non-padding tokens, image tokens included."""
    images_per_second: float = 0.0
    """Images."""
    step_seconds: float = 0.0
    """Wall time of a step."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of which: data_wait, forward, backward, update."""
    peak_memory_gib: float = 0.0
    """Highest allocation on the accelerator so far; on CPU, the process's highest resident size."""
    mfu: float | None = None
    """Model FLOPs utilisation; None where the device's peak is not known."""


@dataclass(frozen=True)
class StepRecord:
    """One line. Steps count from 1; maps are empty where a recipe has nothing of the kind."""

    step: int
    loss: float
    """Language loss plus router losses times their coefficients."""
    language_loss: float
    """Weighted mean of the cross-entropy over the global batch, in nats."""
    loss_by_source: Mapping[str, float]
    """The same by source; a source without a label in this step is left out."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Base learning rate times schedule."""
    part_norms: Mapping[str, float] = field(default_factory=dict)
    """Gradient norm by part (vision, connector, decoder), before clipping."""
    expert_norms: Mapping[str, float] = field(default_factory=dict)
    """Of which: of the part's experts."""
    router_norms: Mapping[str, float] = field(default_factory=dict)
    """Of which: of the part's routers."""
    position_norms: Mapping[str, float] = field(default_factory=dict)
    """Norm of the loss gradient at the decoder's input: over all text positions of the step, over all image positions.
    Empty in a line that is there only because the step was skipped or measured."""
    balance: Mapping[str, float] = field(default_factory=dict)
    """Balance loss by part, without coefficient, mean over layers."""
    switch: Mapping[str, float] = field(default_factory=dict)
    """Switch's balance value with this step's own shares, by part, mean over layers; 1 is even use."""
    z: Mapping[str, float] = field(default_factory=dict)
    """Router z-loss by part, without coefficient, mean over layers."""
    expert_shares: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    """Part -> layer number -> share of this step's choices by expert (sums to 1)."""
    mixture: Mapping[str, float] = field(default_factory=dict)
    """Share of all tokens served so far, by source."""
    padding_share: float = 0.0
    """Share of this step's positions that hold no token."""
    tokens: int = 0
    """Tokens served since step 1."""
    skipped: str = ""
    """Why the update was left out; empty for a normal step."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss by source, and `all`, where the step measured it."""
    matching: Mapping[str, float] = field(default_factory=dict)
    """Image-text matching, where the step measured it."""
    rates: Rates = field(default_factory=Rates)
    """Speed and memory."""

    def as_json(self) -> dict[str, Any]:
        """Plain values: numbers that are not finite become None, `rates` joins the other keys."""
        values = asdict(self)
        values.update(values.pop("rates"))
        return finite(values)


def finite(value: Any) -> Any:
    """`value` with None for each number that JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StepLines:
    """Appends JSON lines that each say their `step`; rank 0's. Lines after `done` are dropped: they come again.

    What a full disk does not take is kept, and tried again with the next line.
    """

    def __init__(self, path: Path, done: int = 0):
        self.path = path
        _keep_until(path, done)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it survives a kill of this process. A loud line says that it has to wait."""
        self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            log.error("%s cannot be written: %s. %d bytes wait for room.", self.path, error, len(self._waiting))

    def close(self) -> None:
        """Close the file."""
        self._flush()
        self._file.close()


class MetricsLog(StepLines):
    """OUT/metrics.jsonl."""

    def __init__(self, run_dir: Path, done: int = 0):
        super().__init__(run_dir / NAME, done)

    def write(self, record: StepRecord) -> None:
        """Add a logged step."""
        super().write(record.as_json())


def _keep_until(path: Path, done: int) -> None:
    """Rewrite the file without lines of steps > done, and without a line that a kill cut short."""
    if not path.exists():
        return
    new = path.with_suffix(".jsonl.tmp")
    with new.open("w", encoding="utf-8") as file:
        for record in each_record(path):
            if record["step"] <= done:
                file.write(json.dumps(record) + "\n")
    new.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file. One that a kill cut short is left out, and so, loudly, is a damaged one."""
    return list(each_record(path))


def each_record(path: Path) -> Iterator[dict[str, Any]]:
    """The same one by one: a long run's lines do not fit into memory together."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                record["step"] += 0
            except (ValueError, TypeError, KeyError):
                log.warning("%s: line %d is damaged and left out: %r", path, number, line[:40])
                continue
            yield record


class Meter:
    """Times the phases of a step and counts what went through, between two lines of the log.

    peak_flops   of all devices together (run.flops); None leaves MFU out
    """

    def __init__(self, device: torch.device, peak_flops: float | None = None):
        self._device, self._peak_flops = device, peak_flops
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = self._tokens = self._images = 0
        self._flops = 0.0

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time inside to `name`. On an accelerator, that is the time to enqueue, and whatever waits for it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside (measurements, first compilation) out of the rates."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def count(self, tokens: int, images: int, flops: float = 0.0) -> None:
        """End a step: what all ranks together put through it, and its model FLOPs."""
        self._steps += 1
        self._tokens += tokens
        self._images += images
        self._flops += flops

    def rates(self) -> Rates:
        """Means since the last call; starts anew."""
        elapsed, steps = max(time.perf_counter() - self._start, 1e-9), max(self._steps, 1)
        rates = Rates(
            tokens_per_second=self._tokens / elapsed,
            images_per_second=self._images / elapsed,
            step_seconds=elapsed / steps,
            seconds={phase: self._seconds[phase] / steps for phase in PHASES},
            peak_memory_gib=peak_memory(self._device) / 2**30,
            mfu=self._flops / elapsed / self._peak_flops if self._peak_flops else None,
        )
        self._restart()
        return rates


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's highest allocation, or on CPU the highest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
