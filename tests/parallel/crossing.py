"""A checkpoint of every layout, loaded by every other: training must go on as if nothing had happened.

"plain" is the reference itself: it reads a checkpoint tensor by tensor and goes on in plain PyTorch, and what it writes
any layout loads.
"""

import itertools
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mmtrain.config.schema import Parallel, Recipe
from mmtrain.model.balance import RouterState
from mmtrain.parallel.box import Box, Piece
from mmtrain.parallel.groups import Groups, connect
from mmtrain.run.comm import SingleProcess
from mmtrain.run.manifest import RunState
from mmtrain.run.reader import Reader, open_checkpoint
from mmtrain.run.retain import step_folder
from mmtrain.run.saver import Saver
from tests import dist, tiny
from tests.parallel import compare, harness
from tests.parallel.harness import Record
from tests.parallel.matrix import meet

SAVED = 3
"""Steps before the checkpoint."""

STEPS = 5
"""Steps after it."""

LAYOUTS: dict[str, tuple[int, Parallel]] = {
    "plain": (1, Parallel()),
    "w1-z0": (1, Parallel(zero_stage=0)),
    "w2-z1-ep2": (2, Parallel(zero_stage=1, expert=2)),
    "w2-z1-tp2": (2, Parallel(zero_stage=1, tensor=2)),
    "w2-z3": (2, Parallel(zero_stage=3)),
    "w3-z2": (3, Parallel(zero_stage=2)),
    "w4-z2-tp2-ep2": (4, Parallel(zero_stage=2, tensor=2, expert=2)),
    "w4-z3-tp2-ep2": (4, Parallel(zero_stage=3, tensor=2, expert=2)),
    "w4-z3-ep2": (4, Parallel(zero_stage=3, expert=2)),
    "w8-z1-tp4-ep2": (8, Parallel(zero_stage=1, tensor=4, expert=2)),
}


class Pair(NamedTuple):
    """Saved under one layout, loaded under another."""

    saved: str
    loaded: str

    def __str__(self) -> str:
        return f"{self.saved}-to-{self.loaded}"


def all_pairs() -> list[Pair]:
    """Every ordered pair of two layouts."""
    return [Pair(*names) for names in itertools.permutations(LAYOUTS, 2)]


def ring() -> list[Pair]:
    """Each layout saves once and loads once."""
    names = list(LAYOUTS)
    return [Pair(*names) for names in zip(names, names[1:] + names[:1], strict=True)]


def recipe_of(layout: str) -> Recipe:
    """AdamW, uneven coefficients, a global batch that all layouts divide."""
    recipe = tiny.uneven(tiny.recipe("adamw", LAYOUTS[layout][1]))
    return replace(recipe, data=replace(recipe.data, global_batch=24))


def run(pairs: Iterable[Pair], folder: Path) -> Iterator[tuple[Pair, float, str]]:
    """(pair, largest difference after loading, its row), for each; layouts of one world size share their ranks."""
    pairs = list(pairs)
    wanted = compare.reference_run(recipe_of("plain"), SAVED + STEPS)
    save_plain(folder, wanted)
    for world, names in _by_world({pair.saved for pair in pairs}):
        dist.run(save, world, str(folder), names)
    for pair in pairs:
        if pair.loaded == "plain":
            yield measure(pair, load_plain(folder / pair.saved), wanted)
    for world, names in _by_world({pair.loaded for pair in pairs}):
        mine = [pair for pair in pairs if pair.loaded in names]
        dist.run(load, world, str(folder), mine, limit=600)
        for pair in mine:
            yield measure(pair, harness.load_record(folder / str(pair), "record"), wanted)
            shutil.rmtree(folder / str(pair))


def _by_world(names: set[str]) -> list[tuple[int, list[str]]]:
    """Layouts of the engine by world size."""
    worlds: dict[int, list[str]] = {}
    for name in sorted(names - {"plain"}):
        worlds.setdefault(LAYOUTS[name][0], []).append(name)
    return sorted(worlds.items())


def measure(pair: Pair, found: Record, wanted: Record) -> tuple[Pair, float, str]:
    """The row with the largest difference."""
    rows = compare.compare(found, compare.tail(wanted, SAVED))
    assert len(rows) == STEPS
    worst = max(rows, key=lambda row: row.largest())
    return pair, worst.largest() if not any(row.ties for row in rows) else torch.inf, str(worst)


def save(folder: str, names: list[str]) -> None:
    """On a rank: train under each layout and write a checkpoint through the saver."""
    for name in names:
        meet(Path(folder) / f"{name}.save.port")
        recipe, groups = recipe_of(name), connect(LAYOUTS[name][1])
        engine = harness.build(recipe, groups)
        record = harness.train(recipe, groups, SAVED, accumulation=1, engine=engine)
        routers = harness.routers_of(recipe)
        for counts in record.counts:
            routers.update({part: value.double() for part, value in counts.items()})
        saver = Saver(Path(folder) / name, groups)
        saver.save(SAVED, engine.pieces(), RunState(engine.updates, "", {}, "", routers=routers.as_json()))
        saver.wait()
        groups.close()


def load(folder: str, pairs: list[Pair]) -> None:
    """On a rank: for each pair, an engine that stands elsewhere loads the checkpoint and goes on."""
    for pair in pairs:
        print(pair, flush=True)
        meet(Path(folder) / f"{pair}.port")
        recipe, groups = recipe_of(pair.loaded), connect(LAYOUTS[pair.loaded][1])
        record = go_on(recipe, groups, open_checkpoint(step_folder(Path(folder) / pair.saved, SAVED), groups))
        (Path(folder) / str(pair)).mkdir(exist_ok=True)
        harness.save_record(record, str(Path(folder) / str(pair)), "record", groups.rank)
        groups.close()


def go_on(recipe: Recipe, groups: Groups, reader: Reader) -> Record:
    """Steps SAVED .. SAVED + STEPS - 1 from a checkpoint."""
    engine, routers = harness.build(recipe, groups), RouterState.first(recipe.model)
    engine.load(reader.read, reader.manifest.state.optimizer_steps)
    routers.load(reader.manifest.state.routers)
    return harness.train(recipe, groups, SAVED + STEPS, 1, engine, SAVED, routers)


def save_plain(folder: Path, record: Record) -> None:
    """Write the reference's own state as a checkpoint."""

    def pieces() -> Iterator[Piece]:
        for (kind, name), value in record.state[SAVED - 1].items():
            shape, step = tuple(value.shape), 0 if kind == "param" else SAVED
            yield Piece(name, kind, shape, Box.whole(shape), (0, value.numel()), value.float().flatten(), step)

    recipe = recipe_of("plain")
    routers = harness.routers_of(recipe)
    for counts in record.counts[:SAVED]:
        routers.update({part: value.double() for part, value in counts.items()})
    saver = Saver(folder / "plain", SingleProcess())
    saver.save(SAVED, pieces(), RunState(SAVED, "", {}, "", routers=routers.as_json()))
    saver.wait()


def load_plain(folder: Path) -> Record:
    """Plain PyTorch from a checkpoint on."""
    reader, record = open_checkpoint(step_folder(folder, SAVED)), Record()
    plain = compare.Reference(recipe_of("plain"))
    for name in plain.params:
        plain.params[name][...] = _padded(reader.read(name), plain.params[name])
        for kind in ("exp_avg", "exp_avg_sq"):
            plain.optimizer.moments[kind, name] = _padded(reader.read(name, kind), plain.params[name])
    plain.optimizer.steps = reader.manifest.state.optimizer_steps
    for part, saved in reader.manifest.state.routers.items():
        plain.load[part] = torch.tensor(saved["load_share"], dtype=plain.dtype)
        plain.bias[part] = torch.tensor(saved["bias"], dtype=plain.dtype)
    for step in range(SAVED, SAVED + STEPS):
        plain.step(step, record)
    return record


def _padded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` with rows of zeros where the vocabulary is padded."""
    out = torch.zeros_like(like)
    out[: value.shape[0]] = value
    return out
