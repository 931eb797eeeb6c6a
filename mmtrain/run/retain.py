"""The checkpoints of a run folder: which there are, which stay."""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from mmtrain.config.errors import CheckpointError
from mmtrain.run import manifest
from mmtrain.run.lock import RunLock
from mmtrain.run.shards import sync_folder

log = logging.getLogger("mmtrain.run")

HELD_OUT = "held_out_loss"
"""Key of RunState.metrics that keep_best compares; lower is better."""

_STEP = re.compile(r"step_(\d{8,})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of a checkpoint."""
    return run_dir / f"step_{step:08d}"


def committed(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint that was committed, by step. Damage is not looked for."""
    found = {}
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def surplus(
    metrics: Mapping[int, Mapping[str, float]], current: int, keep_last: int, keep_every: int, keep_best: bool
) -> list[int]:
    """Steps that may go, of checkpoints with good manifests (step -> metrics), after `current` was committed.

    `current` always stays, and so does everything above it: that is left of a longer run that went on from an older
    checkpoint, and must not push good ones out.
    """
    steps = sorted(step for step in metrics if step <= current)
    stay = {current, *steps[-max(keep_last, 1) :]}
    if keep_every:
        stay.update(step for step in steps if step % keep_every == 0)
    measured = {step: metrics[step][HELD_OUT] for step in steps if HELD_OUT in metrics[step]}
    if keep_best and measured:
        stay.add(min(measured, key=lambda step: (measured[step], -step)))
    return [step for step in steps if step not in stay]


def remove_surplus(run_dir: Path, current: int, keep_last: int, keep_every: int, keep_best: bool) -> None:
    """Delete what the policy lets go. Folders with a damaged manifest are neither counted nor deleted."""
    folders = committed(run_dir)
    metrics = {}
    for step, folder in folders.items():
        try:
            metrics[step] = manifest.read(folder).state.metrics
        except CheckpointError as error:
            log.warning("left alone while old checkpoints were removed: %s", error)
    for step in surplus(metrics, current, keep_last, keep_every, keep_best):
        remove(folders[step])


def remove(folder: Path) -> None:
    """Delete a checkpoint. A kill in the middle leaves a .tmp folder, which nobody reads, and not half a checkpoint."""
    doomed = folder.with_name(folder.name + ".removed.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    sync_folder(folder.parent)
    shutil.rmtree(doomed)


def clean_leftovers(run_dir: Path, lock: RunLock) -> list[Path]:
    """Delete the .tmp folders of saves and removals that were killed; returns them. Only the job that holds the run
    folder may. One that cannot go yet (NFS keeps files that another process has open) is told and left.
    """
    lock.check_held(run_dir)
    leftovers = sorted(path for path in run_dir.glob("step_*.tmp") if path.is_dir())
    for path in leftovers:
        try:
            shutil.rmtree(path)
            log.warning("removed %s, left by a save that was interrupted", path)
        except OSError as error:
            log.warning("%s, left by a save that was interrupted, cannot be removed: %s", path, error)
    return leftovers
