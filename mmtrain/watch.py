"""Everything that looks at a run: metrics, progress, plots, checkpoints with their numbers, the report."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich

from mmtrain.assemble import Assembly, Done
from mmtrain.config.load import dump
from mmtrain.config.schema import Recipe
from mmtrain.data.record import Step
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.measure import Measured
from mmtrain.model.balance import RouterState
from mmtrain.model.build import Flops, parameter_counts
from mmtrain.parallel.engine import Norms
from mmtrain.parallel.groups import Groups
from mmtrain.run.flops import peak_flops
from mmtrain.run.guard import Guard
from mmtrain.run.heartbeat import WAITING, Heartbeat
from mmtrain.run.manifest import RunState
from mmtrain.run.metrics import Meter, MetricsLog, Phase, StepLines, StepRecord, peak_memory
from mmtrain.run.plots import draw_plots
from mmtrain.run.profile import ProfileWindow
from mmtrain.run.progress import ProgressLog
from mmtrain.run.report import Report, table, write_report
from mmtrain.run.retain import HELD_OUT
from mmtrain.run.saver import Saver
from mmtrain.run.wandb_log import WandbLog
from mmtrain.samples import SampleCount
from mmtrain.totals import LossTotals, StepSums

log = logging.getLogger("mmtrain")

LEDGER = "ledger.jsonl"
SKIPPED = "skipped.jsonl"
"""Steps whose update was left out: step, why, and samples by pack (its number is what data.skip_packs takes)."""
DOCUMENTS, UNUSABLE, LOST = "documents/", "unusable/", "lost_tokens/"


class Watch:
    """Rank 0 writes; the other ranks take part in what is collective."""

    def __init__(
        self,
        recipe: Recipe,
        groups: Groups,
        built: Assembly,
        tokenizer: Tokenizer,
        total_steps: int,
        done: Done,
        heart: Heartbeat,
    ) -> None:
        self._recipe, self._groups, self._built, self._total = recipe, groups, built, total_steps
        self._out, self._heart, self._step = Path(recipe.out), heart, done.step
        keep = recipe.checkpoint
        self._saver = Saver(self._out, groups, keep.keep_last, keep.keep_every, keep.keep_best)
        self._meter = Meter(groups.device, peak_flops(groups.device, groups.world))
        self._flops = Flops.of(recipe.model)
        self._tokenizer_files = tokenizer.files()
        self._counters = Counter({name: int(value) for name, value in done.metrics.items() if "/" in name})
        self._measured: Measured | None = None
        self._record: StepRecord | None = None
        self._summed_up: Report | None = None
        self._rank0 = groups.rank == 0
        if self._rank0:
            self._lines = MetricsLog(self._out, done.step)
            self._ledger = StepLines(self._out / LEDGER, done.step)
            self._skipped = StepLines(self._out / SKIPPED, done.step)
            self._progress = ProgressLog(recipe.name, total_steps, done.step)
            self._wandb = WandbLog(recipe.log, recipe.name, self._out, asdict(recipe))

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let go; when the loop ends by an error, the checkpoint that is being written is still finished."""
        if kind is not None:
            self._saver.finish_alone()
        if self._rank0:
            for writer in (self._lines, self._ledger, self._skipped, self._progress, self._wandb):
                writer.close()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Time what happens inside as one of the meter's phases."""
        self._heart.at(self._step + 1, name)
        with self._meter.phase(name):
            yield
        self._heart.at(self._step + 1, WAITING + name)

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Leave what happens inside, after a step, out of the rates."""
        self._heart.at(self._step, name)
        with self._meter.paused():
            yield

    def expects_line(self, step: int, sums: StepSums) -> bool:
        """Whether a step will be logged whatever comes of it; the same on every rank, before its first forward."""
        return bool(sums.stop) or step % self._recipe.log.every == 0 or step in (1, self._total)

    def count(self, step: int, data: Step, sums: StepSums, skipped: str) -> None:
        """Take in a step. Collective where samples or the step were unusable."""
        recipe, self._step, self._measured = self._recipe, step, None
        self._heart.at(step, "report")
        context = recipe.data.sequence_length / 2  # the mean causal context, taken as half a pack
        flops = self._flops.step(sums.tokens, sums.images, float(sums.labels), context)
        self._meter.count(sums.tokens, sums.images, flops)
        self._counters.update(
            {DOCUMENTS + name: count for name, count in zip(recipe.data.sources, sums.documents, strict=True)}
        )
        if sums.unusable:
            self._write_ledger(step, data)
        if skipped:
            self._write_skipped(step, skipped, data)

    def report(
        self,
        step: int,
        data: Step,
        sums: StepSums,
        totals: LossTotals,
        norms: Norms,
        factor: float,
        skipped: str,
        measured: Measured | None,
    ) -> None:
        """Write the line of a step that was counted, when one is due."""
        recipe, self._measured = self._recipe, measured
        self._heart.at(step, "report")
        if not self._rank0:
            return
        self._progress.update(step)
        if not (measured or skipped or self.expects_line(step, sums)):
            return
        served = sum(data.served.values())
        self._record = StepRecord(
            step=step,
            loss=totals.loss(),
            language_loss=totals.language_loss(),
            loss_by_source=totals.by_source(list(recipe.data.sources)),
            grad_norm=norms.grad_norm,
            lr=recipe.optim.lr * factor,
            part_norms=norms.part_norms,
            expert_norms=norms.expert_norms,
            router_norms=norms.router_norms,
            position_norms=norms.position_norms,
            balance={part: float(value) for part, value in totals.by_part("balance").items()},
            switch=totals.switch(),
            z={part: float(value) for part, value in totals.by_part("z").items()},
            expert_shares=totals.expert_shares(),
            mixture={name: count / max(served, 1) for name, count in data.served.items()},
            padding_share=1.0 - sums.tokens / sums.positions,
            tokens=served,
            skipped=skipped,
            held_out=measured.held_out if measured else {},
            matching=measured.matching if measured else {},
            rates=self._meter.rates(),
        )
        self._lines.write(self._record)
        self._progress.report(self._record)
        self._wandb.write(step, self._record.as_json())

    def _write_ledger(self, step: int, data: Step) -> None:
        """Append the unusable samples of all ranks to OUT/ledger.jsonl."""
        # Tensor ranks read the same packs and report the same samples.
        mine = data.ledger if self._groups.tensor_rank == 0 else []
        for line in (line for lines in self._groups.all_gather_object(mine) for line in lines):
            self._counters[UNUSABLE + line["source"]] += 1
            self._counters[LOST + line["source"]] += line["tokens"]
            log.warning("step %d: sample left out: %s", step, json.dumps(line))
            if self._rank0:
                self._ledger.write({"step": step, **line})

    def _write_skipped(self, step: int, why: str, data: Step) -> None:
        """Append a step that was left out, with the samples of all its packs, to OUT/skipped.jsonl."""
        groups, shape = self._groups, self._recipe.data
        first = data.cursor["packs"] - shape.global_batch
        places = [n for n in range(shape.global_batch) if n % shape.num_lanes() % groups.data_size == groups.data_rank]
        mine = {first + place: keys for place, keys in zip(places, data.pack_keys, strict=True)}
        packs = {number: keys for rank in groups.all_gather_object(mine) for number, keys in rank.items()}
        if self._rank0:
            self._skipped.write({"step": step, "why": why, "packs": dict(sorted(packs.items()))})
            log.warning("step %d left out: %s; its samples are in %s", step, why, self._skipped.path)

    def went_back(self, to: int) -> None:
        """Tell that the weights are those of step `to` again."""
        log.warning("step %d: went back to the weights of step %d; its packs and those since are left", self._step, to)
        if self._rank0:
            self._skipped.write({"step": self._step, "why": f"the weights of step {to} are back", "packs": {}})

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if any. Collective."""
        self._heart.at(self._step, "waiting for the checkpoint")
        self._saver.settle()

    def save(
        self,
        step: int,
        routers: RouterState,
        cursor: Mapping[str, Any],
        guard: Guard,
        samples: SampleCount,
        last: bool,
    ) -> None:
        """Start a checkpoint. Collective. last: nothing changes the weights any more."""
        engine, mesh = self._built.engine, self._groups.mesh
        held_out = self._measured.held_out.get("all", math.nan) if self._measured else math.nan
        measured = {HELD_OUT: held_out} if math.isfinite(held_out) else {}
        state = RunState(
            optimizer_steps=engine.updates,
            recipe=dump(self._recipe),
            mesh={
                "world": mesh.world,
                "tensor": mesh.tensor,
                "expert": mesh.expert,
                "zero_stage": self._recipe.parallel.zero_stage,
            },
            registry_hash=self._built.registry.hash(),
            cursor=cursor,
            routers=routers.as_json(),
            metrics={**self._counters, **samples.as_json(), **measured},
            guard=guard.as_json(),
        )
        with self.paused("save"):
            self._saver.save(step, engine.pieces(), state, self._tokenizer_files, last)

    def summarise(self, seconds: float, guard: Guard) -> None:
        """Write report.json and draw the plots; a loud line when that fails. Collective."""
        self._heart.at(self._step, "report")
        memory = max(self._groups.all_gather_object(peak_memory(self._groups.device)))
        if not self._rank0:
            return
        assert self._record is not None, "the step that ends a run is always logged"
        self._summed_up = self._summary(self._record, seconds, guard, memory / 2**30)
        try:
            write_report(self._summed_up, self._out)
            if self._recipe.log.plots:
                draw_plots(self._lines.path, self._out / "plots", self._recipe.name)
        except Exception:  # whatever it is: the last checkpoint is worth more
            log.exception("step %d: report.json and plots are not complete", self._step)

    def end(self) -> None:
        """Wait for the last checkpoint and print the report's table. Collective.

        CheckpointError: the last checkpoint could not be written.
        """
        self._heart.at(self._step, "last checkpoint")
        self._saver.wait()
        if self._summed_up is not None:
            self._progress.close()
            rich.print(table(self._summed_up))

    def _summary(self, record: StepRecord, seconds: float, guard: Guard, memory_gib: float) -> Report:
        """The report of the run as of its last logged step."""
        count = parameter_counts(self._recipe.model)["all"]
        return Report(
            name=self._recipe.name,
            steps=record.step,
            tokens=record.tokens,
            consumed=self._by_source(DOCUMENTS),
            skipped_samples=self._by_source(UNUSABLE),
            lost_tokens=self._by_source(LOST),
            final_losses={**record.loss_by_source, "all": record.language_loss},
            skipped_steps=guard.skips,
            rollbacks=guard.rollbacks,
            expert_shares=record.expert_shares,
            evaluation={"held_out": record.held_out, "matching": record.matching},
            timings={
                "total_seconds": seconds,
                "tokens_per_second": record.rates.tokens_per_second,
                "images_per_second": record.rates.images_per_second,
                **record.rates.seconds,
            },
            parameters={"total": count.total, "active": count.active},
            peak_memory_gib=memory_gib,
        )

    def _by_source(self, prefix: str) -> dict[str, int]:
        """The counters that begin with `prefix`, without it."""
        return {name.removeprefix(prefix): count for name, count in self._counters.items() if name.startswith(prefix)}


def window(profile: ProfileWindow | None, step: int) -> AbstractContextManager[None]:
    """The profiler's window around a step."""
    return profile.step(step) if profile else nullcontext()
