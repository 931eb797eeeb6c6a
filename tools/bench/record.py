"""The line that a benchmark prints, and the file that keeps it with what it was measured on."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "bench" / "results"


def tell(result: dict[str, Any], save: bool) -> None:
    """Print `result` as one JSON line; with `save`, write it to results/BENCH.json too, with hardware and commit."""
    print(json.dumps(result))
    if save:
        RESULTS.mkdir(exist_ok=True)
        kept = {"command": command(), "commit": commit(), "hardware": hardware(), **result}
        (RESULTS / f"{result['bench']}.json").write_text(json.dumps(kept, indent=1) + "\n")


def command() -> str:
    """How this process was started, as a person would type it."""
    module = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("")
    return shlex.join(["python", "-m", ".".join(module.parts), *sys.argv[1:]])


def commit() -> str:
    """The commit that was measured, marked where files differ from it."""
    from mmtrain.run import report  # imports torch, which a measurement of memory may not have there yet

    found, changed, _ = report.commit().partition("+")
    return found[:12] + (", with changes" if changed else "") if found else "not a git checkout"


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and what else kept them busy in the last minute."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
    }


def processor() -> str:
    """The processor's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
