"""Every layout that fits 1, 2, 3, 4, 6 and 8 ranks, each with its numbers against plain PyTorch's.

`covering()` is the part that the test suite runs: every two values of any two settings meet in some case at least once.
`run()` starts the ranks for PER_START cases of a world size; between cases they are back at nothing, not even a process
group.
"""

import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mmtrain.config.layout import engine_problems
from mmtrain.config.schema import Parallel, Recipe
from mmtrain.parallel.environment import free_port
from mmtrain.parallel.groups import connect
from tests import dist, tiny
from tests.parallel import compare, harness
from tests.parallel.harness import Record

STEPS = 5
GLOBAL_BATCH = {1: 32, 2: 32, 4: 32, 8: 32, 3: 24, 6: 24}
"""World size -> packs of a step; the smallest that 4 micro-batches on each rank divide."""

PER_START = 16
"""Cases that ranks run before new ones are forked. DeepSpeed's engine is never quite let go, and with it a dozen
threads of a case's process groups, which wake now and then: 75 of them take 2 % of a core, on each rank."""

STALL = 240.0
"""Seconds without a finished case after which the ranks are killed."""


class Case(NamedTuple):
    """One layout and what it trains with."""

    world: int
    stage: int
    tensor: int
    expert: int
    accumulation: int
    optimizer: str
    clip: bool
    checkpointing: bool
    sequence: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("clip", "checkpointing", "sequence") if getattr(self, name)]
        layout = f"w{self.world}-z{self.stage}-tp{self.tensor}-ep{self.expert}-acc{self.accumulation}"
        return "-".join([layout, self.optimizer, *flags])

    def parallel(self) -> Parallel:
        """The recipe's section."""
        return Parallel(
            tensor=self.tensor,
            expert=self.expert,
            zero_stage=self.stage,
            activation_checkpointing=self.checkpointing,
            sequence_parallel=self.sequence,
        )

    def recipe(self) -> Recipe:
        """The tiny recipe with uneven coefficients, in this layout.

        With sequence parallelism every other layer of the decoder is dense: the two kinds of MLP share positions in
        different ways.
        """
        recipe = tiny.uneven(tiny.recipe(self.optimizer, self.parallel()))
        if self.sequence:
            recipe = tiny.half_dense(recipe)
        data = replace(recipe.data, global_batch=GLOBAL_BATCH[self.world])
        return replace(recipe, data=data, optim=replace(recipe.optim, clip=0.2 if self.clip else 0.0))

    def reference(self) -> tuple[int, str, bool, bool]:
        """What of a case changes the numbers of plain PyTorch."""
        return GLOBAL_BATCH[self.world], self.optimizer, self.clip, self.sequence

    def refused(self) -> str:
        """Why the recipe's check refuses this layout; empty if it does not."""
        return "; ".join(engine_problems(self.parallel()))


def full() -> list[Case]:
    """All cases, each layout once more with checkpointing, and those of several tensor ranks with sequence parallelism.

    SGD without and AdamW with clipping come first.
    """
    layouts = [
        (world, stage, tensor, expert)
        for world, tensor, expert, stage in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4), range(4))
        if world % (tensor * expert) == 0
    ] + [(world, stage, 1, 1) for world in (3, 6) for stage in range(4)]
    plain = [
        Case(*layout, accumulation, optimizer, clip, False)
        for layout in layouts
        for accumulation, optimizer, clip in itertools.product((1, 4), ("sgd", "adamw"), (True, False))
    ]
    more = [Case(*layout, 1, "adamw", True, True) for layout in layouts]
    for layout in layouts:
        if layout[2] > 1:
            more += [Case(*layout, 1, "adamw", True, True, True), Case(*layout, 4, "sgd", False, False, True)]
    return sorted(plain + more, key=lambda case: ((case.optimizer == "adamw") != case.clip, case))


def pairs(case: Case) -> set[tuple]:
    """All two settings of a case with their values; a world size of one says nothing of layouts."""
    settings = [(name, value) for name, value in case._asdict().items() if name != "world"]
    return set(itertools.combinations(settings, 2))


def covering() -> list[Case]:
    """A small set of cases in which every pair of values that any accepted layout has occurs. Greedy.

    Small worlds first: a case on 8 ranks costs twenty times one on a single rank. A pair of settings with world sizes
    3 and 6 is not asked for; each of these worlds gets one case.
    """
    settings = list(itertools.product((1, 4), ("sgd", "adamw"), (True, False), (True, False), (True, False)))
    layouts = sorted({case[:4] for case in full() if not case.refused()})
    candidates = [Case(*layout, *setting) for setting in settings for layout in layouts]
    candidates = [case for case in candidates if case.tensor > 1 or not case.sequence]
    chosen = [Case(3, 2, 1, 1, 1, "adamw", True, False), Case(6, 1, 1, 1, 1, "sgd", True, False)]
    open_pairs = set().union(*map(pairs, candidates)) - set().union(*map(pairs, chosen))
    while open_pairs:
        best = max(candidates, key=lambda case: (len(pairs(case) & open_pairs) / (2 + case.world), case))
        chosen.append(best)
        open_pairs -= pairs(best)
    return sorted(chosen)


class Line(NamedTuple):
    """What came out of one case."""

    case: Case
    error: str
    """Empty, or why there are no numbers."""
    refused: str
    """Why the layout is not offered; empty if it is."""
    largest: dict[str, float]
    """Kind (loss, term, norm, part_norm, param, exp_avg, exp_avg_sq) -> largest difference of all steps."""
    where: dict[str, str]
    """Kind -> name, for those that have names."""
    ties: int

    def passes(self, tolerance: float = compare.TOLERANCE) -> bool:
        """Whether it is refused with a reason, or equal."""
        return bool(self.refused) or (not self.error and all(value <= tolerance for value in self.largest.values()))


class References:
    """Plain PyTorch's records by what changes them, each computed once."""

    def __init__(self) -> None:
        self._records: dict[tuple, Record] = {}

    def of(self, case: Case) -> Record:
        """The record of a case's twin."""
        key = case.reference()
        if key not in self._records:
            self._records[key] = compare.reference_run(case.recipe(), STEPS)
        return self._records[key]


def measure(case: Case, found: Record, wanted: Record) -> Line:
    """The largest differences over all steps."""
    largest: dict[str, float] = {}
    where: dict[str, str] = {}
    rows = compare.compare(found, wanted)
    for row in rows:
        named = {"loss": (row.loss, ""), "term": row.term, "norm": (row.norm, ""), "part_norm": row.part_norm}
        for kind, (value, name) in (named | row.worst).items():
            if not value <= largest.get(kind, -1.0):
                largest[kind], where[kind] = value, name
    return Line(case, "", "", largest, where, sum(row.ties for row in rows))


def run(cases: Iterable[Case], folder: Path, fresh: bool = False) -> Iterator[Line]:
    """Run the cases, neighbours of one world size together; a line as each ends. One that fails ends only its ranks."""
    references = References()
    for world, neighbours in itertools.groupby(cases, lambda case: case.world):
        left = []
        for case in neighbours:
            if reason := case.refused():
                yield Line(case, "", reason, {}, {}, 0)
            else:
                left.append(case)
        while left:
            batch = left[:PER_START]
            watch = Watch(folder, batch, references)
            try:
                dist.run(run_cases, world, str(folder), batch, watch=watch, limit=STALL, fresh=fresh)
                error = ""
            except dist.RankError as failure:
                error = str(failure)
            watch()
            yield from watch.lines
            left = left[len(watch.lines) :]
            if error:
                yield Line(left.pop(0), error, "", {}, {}, 0)


class Watch:
    """Called while the ranks run: takes in what they have finished, and says when that last happened."""

    def __init__(self, folder: Path, cases: list[Case], references: References) -> None:
        self.folder, self.cases, self.references = folder, cases, references
        self.lines: list[Line] = []
        self.since = time.monotonic()

    def __call__(self) -> float:
        while len(self.lines) < len(self.cases):
            case = self.cases[len(self.lines)]
            if not (self.folder / f"{case}.done").exists():
                break
            found = harness.load_record(self.folder / str(case), "record")
            self.lines.append(measure(case, found, self.references.of(case)))
            shutil.rmtree(self.folder / str(case))
            self.since = time.monotonic()
        return self.since


def run_cases(folder: str, cases: list[Case]) -> None:
    """On a rank: each case from connect to close."""
    for case in cases:
        print(case, flush=True)  # the log of a rank that hangs shows where
        meet(Path(folder) / f"{case}.port")
        groups = connect(case.parallel())
        (Path(folder) / str(case)).mkdir(exist_ok=True)
        record = harness.train(case.recipe(), groups, STEPS, case.accumulation)
        harness.save_record(record, str(Path(folder) / str(case)), "record", groups.rank)
        groups.barrier()
        if groups.rank == 0:
            (Path(folder) / f"{case}.done").touch()
        groups.close()
    assert not torch.distributed.is_initialized()


def meet(file: Path) -> None:
    """Agree on a new port. On the old one torch finds its old store again, with the addresses of the last case."""
    if os.environ["RANK"] == "0":
        file.with_suffix(".new").write_text(str(free_port()))
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.005)
    os.environ["MASTER_PORT"] = file.read_text()
