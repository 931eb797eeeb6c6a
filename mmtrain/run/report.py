"""report.json and the table at the end of a stage."""

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from mmtrain.run.metrics import finite
from mmtrain.run.plots import RARE

NAME = "report.json"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "mup", "webdataset", "safetensors", "omegaconf")


@dataclass(frozen=True)
class Report:
    """What a stage did. Maps are empty where it had nothing of the kind."""

    name: str
    steps: int
    """Optimizer steps, skipped ones included."""
    tokens: int
    """Tokens served, image tokens included."""
    consumed: Mapping[str, int]
    """Documents packed, by source; each part of one that was cut counts, and so do those of skipped steps."""
    skipped_samples: Mapping[str, int]
    """Samples in the ledger, by source."""
    final_losses: Mapping[str, float]
    """Loss by source, and `all`, of the last logged step."""
    lost_tokens: Mapping[str, int] = field(default_factory=dict)
    """Positions that stayed padding for skipped samples, by source. Nothing else is lost: long documents go on."""
    skipped_steps: int = 0
    """Steps left out because their numbers were not finite, or spikes."""
    rollbacks: int = 0
    """Times that the weights went back to a checkpoint."""
    expert_shares: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    """Part -> layer -> share of choices by expert, last logged step."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Held-out loss, matching, and what was evaluated after the stage."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds and rates: total_seconds, tokens_per_second, data_wait, forward, backward, update, ..."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """total and active."""
    peak_memory_gib: float = 0.0
    """Highest over ranks."""

    def rare_experts(self) -> list[str]:
        """Experts with less than 2% of their layer's choices, as `decoder layer 3 expert 1 (0.4%)`."""
        return [
            f"{part} layer {layer} expert {expert} ({share:.1%})"
            for part, layers in self.expert_shares.items()
            for layer, shares in layers.items()
            for expert, share in enumerate(shares)
            if share < RARE
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values, with rare experts, versions and the commit."""
        return finite({**asdict(self), "rare_experts": self.rare_experts(), "versions": versions(), "commit": commit()})


def versions() -> dict[str, str]:
    """Python, platform, and the packages that numbers depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of this source tree, with `+changes` when files differ from it; empty outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def write_report(report: Report, run_dir: Path) -> Path:
    """Write OUT/report.json whole or not at all."""
    path = run_dir / NAME
    new = path.with_suffix(".json.tmp")
    new.write_text(json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)
    return path


def table(report: Report) -> Table:
    """The same for a terminal (rich.print it)."""
    rows = Table(title=f"{report.name}: {report.steps:,} steps, {report.tokens:,} tokens", title_justify="left")
    rows.add_column("what")
    rows.add_column("value", justify="right")
    for source, loss in report.final_losses.items():
        rows.add_row(f"loss, {source}", f"{loss:.4f}")
    for source, count in report.consumed.items():
        bad = report.skipped_samples.get(source, 0)
        rows.add_row(f"samples, {source}", f"{count:,}" + (f" ({bad:,} unusable)" if bad else ""))
    for key, value in _leaves(report.evaluation):
        rows.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    for key, value in report.timings.items():
        rows.add_row(key.replace("_", " "), f"{value:,.2f}")
    rows.add_row("peak memory", f"{report.peak_memory_gib:.2f} GiB")
    if report.skipped_steps:
        rows.add_row("skipped steps", str(report.skipped_steps))
    if report.expert_shares:
        rare = report.rare_experts()
        rows.add_row(
            "experts under 2%",
            "\n".join(rare[:8]) + (f"\nand {len(rare) - 8} more" if rare[8:] else "") if rare else "none",
        )
    return rows


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested maps as one list of (name, value); lists are left to report.json."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}, ")
        elif not isinstance(value, list):
            found.append((prefix + key, value))
    return found
