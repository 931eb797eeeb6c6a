"""manifest.json: what a checkpoint is, sealed by its own sha256.

The file is one JSON object, a key a line; its last line but one is the sha256 of every byte before that line. Reading
compares these bytes, not parsed values, so that no spelling of the same JSON passes for the one that was written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmtrain.config.errors import CheckpointError
from mmtrain.run.report import commit

NAME = "manifest.json"
FORMAT = "mmtrain checkpoint"
VERSION = 1

RESTORE = "Name another checkpoint, or remove this folder so that nobody takes it for a good one."


@dataclass(frozen=True)
class RunState:
    """What goes into a checkpoint beside tensors. Every value is plain JSON.

    optimizer_steps   updates that were applied (skipped steps do not count); Adam's step
    recipe            resolved recipe as yaml text
    mesh              world, tensor, expert, zero_stage of the run that wrote it (a note: any layout reads it)
    registry_hash     hash of names, roles and base widths (mup.registry)
    cursor            planner cursor; its state after this step
    routers           part -> {"load_share": [layers][E], "bias": [layers][E]}
    metrics           numbers worth choosing by, e.g. held_out_loss
    guard             what the guard knows of earlier steps (run.guard); empty in weights that nobody trained
    """

    optimizer_steps: int
    recipe: str
    mesh: Mapping[str, int]
    registry_hash: str
    cursor: Mapping[str, Any] = field(default_factory=dict)
    routers: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """A file of the folder: bytes and sha256 (hex)."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A verified manifest. `tensors` maps global names to global shapes."""

    step: int
    state: RunState
    files: dict[str, FileRecord]
    tensors: dict[str, tuple[int, ...]]
    commit: str = ""
    """Of the source tree that wrote it; empty outside git, and where this was not kept yet."""


def encode(manifest: Manifest) -> bytes:
    """Bytes of manifest.json. ValueError on a NaN: JSON has none."""
    state = manifest.state
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "commit": this_commit(),
        "step": manifest.step,
        **{name: getattr(state, name) for name in RunState.__dataclass_fields__},
        "files": {name: {"size": record.size, "sha256": record.sha256} for name, record in manifest.files.items()},
        "tensors": {name: list(shape) for name, shape in manifest.tensors.items()},
    }
    lines = [f"{json.dumps(key)}: {_dump(value)}," for key, value in values.items()]
    body = ("{\n" + "\n".join(lines) + "\n").encode()
    return body + _seal(body)


this_commit = lru_cache(commit)
"""Asked of git once."""


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _seal(body: bytes) -> bytes:
    return f'"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


_SEAL_SIZE = len(_seal(b""))


def decode(data: bytes, folder: Path) -> Manifest:
    """Verify and parse the bytes of manifest.json; CheckpointError names `folder`."""
    body, seal = data[:-_SEAL_SIZE], data[-_SEAL_SIZE:]
    if seal != _seal(body):
        raise CheckpointError(
            f"{folder}: {NAME} is damaged: its {len(data)} bytes do not match the sha256 at its end. {RESTORE}"
        )
    values = json.loads(data)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: {NAME} says format {values.get('format')!r}, not {FORMAT!r}. {RESTORE}")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: {NAME} has version {values.get('version')}; this mmtrain reads version {VERSION}. "
            f"Read it with the mmtrain that wrote it, commit {values.get('commit') or 'unknown'}."
        )
    return Manifest(
        step=values["step"],
        state=RunState(**{name: values[name] for name in RunState.__dataclass_fields__ if name in values}),
        files={name: FileRecord(**record) for name, record in values["files"].items()},
        tensors={name: tuple(shape) for name, shape in values["tensors"].items()},
        commit=values.get("commit", ""),
    )


def read(folder: Path) -> Manifest:
    """The verified manifest of a checkpoint folder; the other files are not looked at.

    Raises CheckpointError when the folder is none, or its manifest is damaged or of another version.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Name a step folder (step_00000100) or its run folder.")
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: {_why_not(folder)}") from None
    return decode(data, folder)


def _why_not(folder: Path) -> str:
    """Why there is no manifest, as far as the folder tells."""
    names = sorted(path.name for path in folder.iterdir())
    if folder.name.endswith(".tmp"):
        return "it is what an unfinished save left behind; it was never committed. Use an older checkpoint."
    if steps := [name for name in names if name.startswith("step_") and not name.endswith(".tmp")]:
        return f"it is a run folder. Name one of its checkpoints: {shortened(steps)}."
    if found := [name for name in names if name.endswith((".safetensors", ".bin", ".pt"))]:
        return (
            f"it holds {shortened(found)} but no {NAME}. Weights of other libraries come in through "
            "`python -m tools.convert hf-to-mm`."
        )
    return f"it holds no {NAME} ({len(names)} other files). Name a step folder (step_00000100) of a run."


def shortened(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
