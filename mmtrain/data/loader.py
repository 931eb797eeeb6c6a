"""The stream that a data-parallel rank trains on: one optimizer step at a time, all its micro-batches at once."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.layout import lane_problems, share_problems
from mmtrain.config.schema import Recipe, Source
from mmtrain.config.tokens import TokenKind
from mmtrain.data.ahead import Fetcher
from mmtrain.data.batch import canvas_of, stack
from mmtrain.data.collate import EVEN, PackArrays, Shape
from mmtrain.data.index import Shard, check_index, index_paths, open_folder
from mmtrain.data.ordering import Planned, Sizer
from mmtrain.data.plan import Plan, Planner
from mmtrain.data.pool import WorkerPool
from mmtrain.data.quarantine import NO_FILE, read_quarantine
from mmtrain.data.reader import Reader, ReaderSpec, ReadPack
from mmtrain.data.record import Step
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.data.window import Skipped

STEPS_AHEAD = 2
"""Steps planned and being decoded while the model works on one."""


class _Pending(NamedTuple):
    """A step on its way."""

    packs: list[list[Planned]]
    answers: list[Future[ReadPack]]
    skipped: list[Skipped]
    cursor: dict[str, Any]
    served: dict[str, int]


class Loader:
    """Iterates `Step`s. The packs of a step depend on recipe, shards and seed alone, never on ranks or workers.

    Pack i of a step belongs to lane i mod lanes, and a lane to data rank lane mod data_size.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        data_rank: int,
        data_size: int,
        sources: Mapping[str, Source] | None = None,
        cursor: Mapping[str, Any] | None = None,
        finite_batches: int | None = None,
    ) -> None:
        """Open the shards of `sources` (default: the recipe's) and continue after `cursor`, if given.

        `finite_batches`: end after as many global batches, with each sample at most once, every target of weight 1 and
        empty packs when they run out (evaluation). ConfigError or DataError if layout, shards or cursor do not fit.
        """
        shared = share_problems(recipe.data, data_size, f"data size {data_size}")
        if problems := [*lane_problems(recipe.data), *shared]:
            raise ConfigError("\n".join(problems))
        self._recipe, self._finite = recipe, finite_batches
        self._rank, self._size = data_rank, data_size
        self._sources = dict(recipe.data.sources if sources is None else sources)
        self._shape = Shape(canvas_of(recipe), recipe.model.connector.num_tokens, recipe.data.sequence_length)
        self._planner, self._quarantine = make_planner(recipe, tokenizer, self._sources, finite_batches is not None)
        self._tokenizer = tokenizer
        self._steps = self._moved = 0  # steps begun, and by how many that is more than packs / global_batch
        if cursor is not None:
            self._restore(cursor)
        self._spec = ReaderSpec(
            str(tokenizer.path),
            recipe.data.chat_template,
            self._shape,
            tuple(self._sources),
            recipe.data.cache,
            int(recipe.data.cache_gib * 2**30),
            EVEN if finite_batches is not None else recipe.data.loss_weights,
        )
        self._reader = Reader(self._spec, tokenizer)
        self._fetcher = Fetcher(self._spec.open_cache(), self._spec.cache_bytes)
        self._needed: deque[Sequence[Shard]] = deque(maxlen=2 + STEPS_AHEAD)
        workers = recipe.data.workers
        self._pool = WorkerPool(self._spec, workers, recipe.data.max_images) if workers else None

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, from its beginning, whatever the cursor."""
        if self._finite is not None:
            return self._finite
        if self._recipe.steps:
            return self._recipe.steps
        return self._moved + self.steps_for_epochs(self._recipe, self._tokenizer, self._sources)

    @staticmethod
    def steps_for_epochs(recipe: Recipe, tokenizer: Tokenizer, sources: Mapping[str, Source] | None = None) -> int:
        """Steps that recipe.epochs passes over the longest-lasting source make.

        The plan is made once to count its packs (tools/bench/loader.py measures how long that takes).
        """
        planner, _ = make_planner(replace(recipe, steps=0), tokenizer, sources or recipe.data.sources)
        steps = 0
        while not planner.finished:
            planner.next_step()
            steps += 1
        return steps

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left of `total_steps`."""
        left = self.total_steps - self._steps
        pending: deque[_Pending] = deque()
        while left > 0 or pending:
            while left > 0 and len(pending) < (1 + STEPS_AHEAD if self._pool else 1):
                pending.append(self._begin())
                left -= 1
            yield self._finish(pending.popleft())

    def worker_pids(self) -> list[int]:
        """Process ids of the decoding processes."""
        return self._pool.processes() if self._pool else []

    def close(self) -> None:
        """End the decoding processes, and what fetches remote shards."""
        if self._pool:
            self._pool.close()
        self._fetcher.close()

    def __enter__(self) -> "Loader":
        """Closes by itself at the end of a `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def _begin(self) -> _Pending:
        """Plan a step and have this rank's packs decoded."""
        if self._finite is None and self._recipe.steps and self._planner.finished:
            raise DataError(
                f"data: every source has given its max_epochs after {self._steps} of steps={self._recipe.steps}; lower "
                "steps, or raise data.sources.NAME.max_epochs"
            )
        plan: Plan = self._planner.next_step()
        if self._finite is None:  # an evaluation reads little of what follows, and would take its room from training
            now, following = self._planner.shards()
            self._needed.append(now)  # packs of the last steps may not be decoded yet
            self._fetcher.want(list(chain(*self._needed)), following)
        lanes = self._recipe.data.num_lanes()
        packs = [pack for number, pack in enumerate(plan.packs) if number % lanes % self._size == self._rank]
        answers = [self._pool.submit(pack) for pack in packs] if self._pool else []
        # A sample that cannot be planned has no lane; the ranks share the reporting.
        skipped = plan.skipped[self._rank :: self._size]
        self._steps += 1
        cursor = self._planner.cursor() | {"quarantine": self._quarantine, "steps": self._steps}
        return _Pending(packs, answers, skipped, cursor, self._planner.served)

    def _restore(self, cursor: Mapping[str, Any]) -> None:
        """Continue after `cursor`; DataError if another quarantine file was in force."""
        before = cursor.get("quarantine", NO_FILE)
        if before != self._quarantine and "data.quarantine" not in self._recipe.resume_allow:
            raise DataError(
                f"data.quarantine: the run began with file {before}, now it is {self._quarantine} (short sha256); "
                "restore it, or name data.quarantine in resume_allow"
            )
        self._planner.restore(cursor)
        at_this_size = self._planner.packs // self._recipe.data.global_batch
        self._steps = cursor.get("steps", at_this_size)
        self._moved = self._steps - at_this_size  # not 0 once data.global_batch has changed

    def _finish(self, pending: _Pending) -> Step:
        """Wait for a step's packs and make its micro-batches and sums."""
        if self._pool:
            read = [answer.result() for answer in pending.answers]
        else:
            read = [self._reader.read(pack) for pack in pending.packs]
        size = self._recipe.data.micro_batch
        groups = [[item.arrays for item in read[at : at + size]] for at in range(0, len(read), size)]
        batches = [stack(group, self._shape, len(self._sources)) for group in groups]
        names = tuple(self._sources)
        ledger = [line for item in read for line in item.ledger]
        withheld = {planned.withheld for pack in pending.packs for planned in pack if planned.withheld}
        for skipped in pending.skipped:
            ledger.append({**skipped._asdict(), "source": names[skipped.source], "tokens": 0})
        return Step(
            micro_batches=batches,
            label_weight=float(sum([item.arrays.weights.sum(dtype=np.float64) for item in read])),
            valid_tokens=self._valid_tokens([item.arrays for item in read]),
            cursor=pending.cursor,
            served=pending.served,
            ledger=ledger,
            pack_keys=[item.arrays.keys for item in read],
            samples=sum(map(len, pending.packs)) + len(pending.skipped),
            bad=[line for line in ledger if line["reason"] not in withheld],
        )

    def _valid_tokens(self, packs: Sequence[PackArrays]) -> dict[str, float]:
        """Tokens that each part's routers see, without blanks and padding."""
        vision = self._recipe.model.vision
        rows, columns = vision.grid()
        images = sum([len(pack.panels) for pack in packs])
        positions = sum([np.count_nonzero(pack.kind != TokenKind.PADDING) for pack in packs])
        return {
            "vision": float(images * (rows * columns + vision.class_token)),
            "connector": float(images * self._shape.image_tokens),
            "decoder": float(positions),
        }


def check_sources(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """DataError if a folder of shards is missing, or the first shard of one has no index for this tokenizer.

    A glance, for every rank, before anything is built; the loader looks at all shards.
    """
    for sources in (recipe.data.sources, recipe.eval.sources if recipe.eval.every else {}):
        for source in sources.values():
            if source.weight > 0:
                check_index(index_paths(Path(source.shards))[0], tokenizer)


def make_planner(
    recipe: Recipe, tokenizer: Tokenizer, sources: Mapping[str, Source], finite: bool = False
) -> tuple[Planner, str]:
    """The recipe's plan over `sources`, from its beginning, and the hash of the quarantine file.

    `finite`: each sample at most once. Otherwise it ends after recipe.epochs passes over the longest-lasting source
    (by tokens / weight), or, if the recipe has steps, only when every source has had its max_epochs.
    """
    data, seed = recipe.data, recipe.seed
    weights = {name: source.weight for name, source in sources.items()}
    shards = {name: open_folder(source.shards, tokenizer) for name, source in sources.items() if source.weight > 0}
    if not data.allow_pipes:
        _refuse_pipes(shards)
    sizer = Sizer(canvas_of(recipe), recipe.model.connector.num_tokens)
    samples = {name: sum(shard.header.samples for shard in of_source) for name, of_source in shards.items()}
    if finite:
        data = replace(data, skip_packs=[])  # numbers of the training stream
        return Planner(shards, data, seed, sizer, weights, samples), NO_FILE
    caps = {
        name: max(1, round(sources[name].max_epochs * samples[name])) for name in shards if sources[name].max_epochs
    }
    passes: dict[str, int] = {}
    if not recipe.steps:
        longest = Planner(shards, data, seed, sizer, weights).longest_lasting()
        passes = {longest: max(1, round(recipe.epochs * samples[longest]))}
    quarantine = read_quarantine(data.quarantine, shards)
    return Planner(shards, data, seed, sizer, weights, passes, caps, quarantine.samples), quarantine.hash


def _refuse_pipes(shards: Mapping[str, Sequence[Shard]]) -> None:
    """ConfigError if an index names a shell command: indexes may come from elsewhere."""
    for name, of_source in shards.items():
        for shard in of_source:
            if shard.path.startswith("pipe:"):
                raise ConfigError(
                    f"data.sources.{name}: index {shard.index} would run {shard.path!r}; set data.allow_pipes=true if "
                    "you trust these indexes"
                )
