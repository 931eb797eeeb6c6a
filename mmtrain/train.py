"""One stage of training, from recipe to report, read top to bottom."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmtrain.assemble import assemble, go_back, interrupted, resume
from mmtrain.config.check import check
from mmtrain.config.errors import DataError, UserError
from mmtrain.config.schema import Recipe
from mmtrain.data.loader import Loader, check_sources
from mmtrain.data.record import Step
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.data.transfer import on_device
from mmtrain.measure import HeldOut
from mmtrain.model.balance import RouterState
from mmtrain.model.probe import GradientProbe
from mmtrain.optim.schedule import lr_factor
from mmtrain.parallel.environment import discover
from mmtrain.parallel.groups import Groups, connect
from mmtrain.preflight import check_vocabulary
from mmtrain.run.guard import Guard, StopFlag, exit_code, stop_reason
from mmtrain.run.heartbeat import Heartbeat
from mmtrain.run.lock import RunLock
from mmtrain.run.profile import ProfileWindow
from mmtrain.samples import SampleCount
from mmtrain.totals import FAILED, LossTotals, StepSums
from mmtrain.watch import Watch, window

log = logging.getLogger("mmtrain")


class Options(NamedTuple):
    """What belongs to one start of the command and not to the run."""

    check_only: bool = False
    """Do every check, read one step of data, stop."""
    profile: str = ""
    """FIRST:LAST steps to trace; empty for none."""


def train(recipe: Recipe, options: Options = Options()) -> int:  # noqa: B008 - a constant
    """Run `recipe` to its last step, from its newest checkpoint if there is one. Returns the process's exit code.

    UserError for everything that a person can mend; before the first step wherever that can be known there.
    """
    # ---- what, and on how many ranks: every check that needs no process group
    place = discover()
    check(recipe, place.world)
    profile = ProfileWindow(options.profile, Path(recipe.out), place.rank) if options.profile else None
    tokenizer = Tokenizer(recipe.data.tokenizer, recipe.data.chat_template)
    check_vocabulary(recipe.model, tokenizer)
    check_sources(recipe, tokenizer)
    groups = connect(recipe.parallel, place)
    lock = RunLock(Path(recipe.out), groups)
    with (
        Heartbeat(Path(recipe.out), groups, recipe.guard.stall_seconds) as heart,
        StopFlag(Path(recipe.out), groups.rank) as stop,
    ):
        return run(recipe, options, tokenizer, groups, lock, profile, heart, stop)


def run(
    recipe: Recipe,
    options: Options,
    tokenizer: Tokenizer,
    groups: Groups,
    lock: RunLock,
    profile: ProfileWindow | None,
    heart: Heartbeat,
    stop: StopFlag,
) -> int:
    """What `train` does once the ranks know each other."""
    # ---- a model for one device, its pieces on the ranks, and where an interrupted run stood
    out, sources = Path(recipe.out), len(recipe.data.sources)
    reader = interrupted(recipe, groups, lock)
    built = assemble(recipe, groups, going_on=reader is not None)
    engine, routers = built.engine, RouterState.first(recipe.model, groups.device)
    done = resume(recipe, reader, built, routers)

    # ---- what it learns from, and how it is watched
    loader = Loader(recipe, tokenizer, groups.data_rank, groups.data_size, cursor=done.cursor)
    total_steps = loader.total_steps
    held_out = HeldOut(recipe, tokenizer, groups)
    batches = iter(loader)
    if done.step >= total_steps:
        log.info("%s: all %d steps are done", recipe.name, total_steps)
        return finish(loader, lock, groups)
    if options.check_only:
        _, sums = agreed(*next_step(batches), 0, groups, sources)
        log.info("%s: every check passed; a step holds %d tokens, %d images", recipe.name, sums.tokens, sums.images)
        return finish(loader, lock, groups)
    guard, samples = Guard(recipe.guard, done.guard), SampleCount(recipe.data.max_bad_fraction, done.metrics)

    # ---- the loop
    started, stopped = time.perf_counter(), 0
    with Watch(recipe, groups, built, tokenizer, total_steps, done, heart) as watch:
        for step in range(done.step + 1, total_steps + 1):
            with window(profile, step):
                with watch.phase("data_wait"):
                    mine = next_step(batches)
                data, sums = agreed(*mine, stop.code(), groups, sources)
                samples.add(sums, data, groups)
                probe = GradientProbe(groups.device) if watch.expects_line(step, sums) else None
                inputs = routers.inputs(sums.label_weight, sums.valid_tokens, probe)
                totals = LossTotals(recipe.model)
                for number, batch in enumerate(on_device(data.micro_batches, groups.device)):
                    with watch.phase("forward"):
                        losses = engine.forward(batch, inputs)
                    with watch.phase("backward"):
                        engine.backward(losses.total, last=number == len(data.micro_batches) - 1)
                    totals.add(losses)
                totals.reduce(groups)
                factor = lr_factor(step, recipe.optim, total_steps)
                with watch.phase("update"):
                    norms = engine.norms(probe)
                    skipped = guard.judge(
                        step, totals.loss(), norms.grad_norm, float(sums.label_weight), data.pack_keys
                    )
                    if skipped:
                        engine.discard()
                    else:
                        engine.step(factor)
                        routers.update(totals.by_part("counts"))
            watch.count(step, data, sums, skipped)
            if before := guard.go_back_before(step):
                watch.settle()
                if back := go_back(out, before, built, routers, groups):
                    guard.went_back(back)
                    watch.went_back(back)
            stopped, last = sums.stop, step == total_steps
            if stopped and not last:  # at once: who stops a job may not wait for the rest
                watch.save(step, routers, data.cursor, guard, samples, last=True)
            with watch.paused("measure"):
                measured = held_out.measure(engine, routers) if held_out.due(step, total_steps) else None
            watch.report(step, data, sums, totals, norms, factor, skipped, measured)
            if stopped or last:
                # Before the last step's checkpoint: once that is there, the same command has nothing left to do.
                watch.summarise(time.perf_counter() - started, guard)
            if last or (step % recipe.checkpoint.every == 0 and not stopped):
                watch.save(step, routers, data.cursor, guard, samples, last)
            if stopped:
                log.info("%s: stopped after step %d: %s", recipe.name, step, stop_reason(stopped))
                break
        if profile:
            profile.close()
        watch.end()
    return finish(loader, lock, groups, exit_code(stopped) if stopped else 0)


def next_step(batches: Iterator[Step]) -> tuple[Step | None, str]:
    """This rank's next step of data, or why it cannot go on."""
    try:
        return next(batches), ""
    except UserError as error:
        return None, str(error)


def agreed(data: Step | None, problem: str, stop: int, groups: Groups, num_sources: int) -> tuple[Step, StepSums]:
    """This rank's data and the sums over all ranks. Collective.

    DataError, on every rank: some rank has a problem with its data; otherwise the others would wait for it.
    """
    sums = StepSums.of(data, FAILED if problem else stop, groups, num_sources)
    if sums.stop == FAILED:
        problems = [text for text in groups.all_gather_object(problem) if text]
        raise DataError("\n".join(dict.fromkeys(problems)))
    return data, sums


def finish(loader: Loader, lock: RunLock, groups: Groups, code: int = 0) -> int:
    """Let go of everything that outlives a function; returns `code`."""
    loader.close()
    groups.barrier()
    lock.release()
    groups.close()
    return code
