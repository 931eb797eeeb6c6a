"""The trials of a sweep, shared by all its workers: an Optuna study in one file of the sweep's folder.

Any number of processes on any number of machines that see the folder may work on one study. A worker holds a lock in
OUT/claims/NUMBER while it works on trial NUMBER; the lock goes with the process, so a trial that is called running but
is locked by nobody was interrupted, and the next worker goes on with it.
"""

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from mmtrain.config.errors import ConfigError
from mmtrain.config.seed import derive
from mmtrain.run.lock import InUse, RunLock
from mmtrain.sweep.identity import changes, identity
from mmtrain.sweep.spec import VARIANT, Choices, Prune, Sweep, Value
from mmtrain.sweep.trial import Curve, Judge, Outcome

log = logging.getLogger("mmtrain")

FILES = {"journal": "study.journal", "sqlite": "study.db"}

ATTEMPTS = 3
"""Times that a trial may end its worker in the middle before it is counted out: others are to have their turn."""

OURS = ("attempts", "repeat_seed", "repeat_of")
"""What is kept of a trial beside its facts."""

State = Literal["waiting", "running", "done", "diverged", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial as everybody sees it."""

    number: int
    state: State
    params: dict[str, Value]
    loss: float
    """Held-out loss; infinite where training diverged, NaN where there is none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """See mmtrain.sweep.trial.facts."""
    seed: int | None = None
    """Seed of a repetition; None for a first run."""


@dataclass(frozen=True)
class Claim:
    """A trial that this worker holds."""

    number: int
    params: dict[str, Value]
    seed: int | None
    lock: RunLock


class Study:
    """A sweep's study, opened or made."""

    def __init__(self, sweep: Sweep, create: bool = True) -> None:
        """ConfigError: there is none (create=False), or the folder holds the study of another sweep."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep = sweep
        self._distributions = _distributions(sweep)
        if create:
            with self._turn():
                self._open()
                self._begin()
        else:
            there = (sweep.out / FILES[sweep.storage]).exists()
            if there:
                self._open()
            if not there or "sweep" not in self._study.user_attrs:
                raise ConfigError(f"{sweep.out}: no study yet; start it with python launch/sweep.py {sweep.file}")
            self._compare()

    def trials(self) -> list[Trial]:
        """All trials, in the order of their numbers."""
        return [_plain(trial) for trial in self._study.get_trials(deepcopy=False)]

    def claim(self) -> Claim | Literal["wait"] | None:
        """The next trial for this worker: an interrupted one first; "wait" while others decide; None at the end."""
        with self._turn():
            trials = self.trials()
            for trial in trials:
                if trial.state == "running" and (lock := self._lock(trial.number)):
                    claim = Claim(trial.number, trial.params, trial.seed, lock)
                    attempts = self._optuna(claim).user_attrs.get("attempts", 0)
                    if VARIANT in trial.params and attempts < ATTEMPTS:
                        return claim
                    # Without a variant, the last value of a point, a worker was killed while it asked for the others.
                    log.error("trial %d ended %d workers and is counted out", trial.number, max(attempts, 1))
                    self.let_go(claim)
            if any(trial.state == "waiting" for trial in trials) or new_points(self.sweep, self.trials()):
                return self._ask()
            if any(trial.state == "running" for trial in self.trials()):
                return "wait" if self.sweep.repeat else None
            return self._ask() if self._enqueue_repetitions() else None

    def finish(self, claim: Claim, outcome: Outcome, found: dict[str, Any]) -> None:
        """Keep what a trial came to. An interrupted one waits for whoever comes next."""
        if outcome.ending == "interrupted":
            self.put_back(claim)
        else:
            trial = self._optuna(claim)
            for key, value in found.items():
                trial.set_user_attr(key, value)
            if outcome.ending == "pruned":
                last = min((loss for _, loss in outcome.curve), default=math.inf)
                trial.report(last, outcome.steps)  # Optuna's samplers learn from it
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, outcome.loss)
            claim.lock.release()

    def count_attempt(self, claim: Claim) -> None:
        """Note that training begins, in case it takes this process with it."""
        trial = self._optuna(claim)
        trial.set_user_attr("attempts", trial.user_attrs.get("attempts", 0) + 1)

    def put_back(self, claim: Claim) -> None:
        """Leave a trial to whoever comes next: its worker ended in an orderly way, which is no attempt."""
        if claim.lock.held:
            self._optuna(claim).set_user_attr("attempts", 0)
            claim.lock.release()

    def let_go(self, claim: Claim) -> None:
        """Count a trial out that an error ended."""
        self._study.tell(claim.number, state=TrialState.FAIL)
        claim.lock.release()

    def judge(self, claim: Claim, steps: int) -> Judge:
        """The median rule for a claimed trial of `steps` steps. A repetition is there to be compared: it ends."""
        prune = self.sweep.prune
        variant = claim.params[VARIANT]
        return lambda curve: (
            prune is not None
            and claim.seed is None
            and median_rule(
                prune,
                curve,
                steps,
                lambda: [trial.facts["curve"] for trial in self.trials() if _finished(trial, variant)],
            )
        )

    def _open(self) -> None:
        """The study in the sweep's file. ConfigError: the file holds one of another name."""
        self.sweep.out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = _storage(self.sweep.out / FILES[self.sweep.storage], self.sweep.storage)
        if any(name != self.sweep.name for name in optuna.get_all_study_names(storage)):
            raise self._other("name")
        self._study = optuna.create_study(
            storage=storage, sampler=_sampler(self.sweep, 0), study_name=self.sweep.name, load_if_exists=True
        )

    def _begin(self) -> None:
        """Once in a study's life: the points of a grid, and what it is."""
        if "sweep" in self._study.user_attrs:
            self._compare()
            return
        for point in self.sweep.points() if self.sweep.sampler == "grid" else ():
            self._study.enqueue_trial(point, skip_if_exists=True)  # a worker may have been killed on the way
        self._study.set_user_attr("sweep", identity(self.sweep))

    def _compare(self) -> None:
        """ConfigError: the study is not this sweep's."""
        if changed := changes(self._study.user_attrs["sweep"], identity(self.sweep)):
            raise self._other(changed)

    def _other(self, changed: str) -> ConfigError:
        return ConfigError(
            f"{self.sweep.out} holds the study of another sweep: {changed} differ; choose another out, "
            "or go back (trials, repeat and prune may change)"
        )

    def _ask(self) -> Claim:
        """A new trial, or the next one that waits."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = _sampler(self.sweep, len(self._study.get_trials(deepcopy=False)))
            trial = self._study.ask(self._distributions)
        lock = self._lock(trial.number)
        assert lock is not None, "a number that was just made belongs to nobody"
        return Claim(trial.number, dict(trial.params), trial.user_attrs.get("repeat_seed"), lock)

    def _enqueue_repetitions(self) -> bool:
        """Put the repetitions that are missing in line; whether there are any."""
        missing = repetitions(self.sweep, self.trials())
        for trial, seed in missing:
            self._study.enqueue_trial(trial.params, user_attrs={"repeat_seed": seed, "repeat_of": trial.number})
        return bool(missing)

    def _optuna(self, claim: Claim) -> optuna.trial.Trial:
        return optuna.trial.Trial(self._study, self._study.get_trials(deepcopy=False)[claim.number]._trial_id)

    def _lock(self, number: int) -> RunLock | None:
        """The lock on a trial; None while another process holds it."""
        try:
            return RunLock(self.sweep.out / "claims" / f"{number:04d}", wait=False)
        except InUse:
            return None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One worker at a time decides who does what."""
        deadline = time.monotonic() + 120.0
        while True:
            try:
                lock = RunLock(self.sweep.out / "claims", wait=False)
                break
            except InUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        try:
            yield
        finally:
            lock.release()


def new_points(sweep: Sweep, trials: list[Trial]) -> int:
    """How many points the sampler has still to choose: one that was counted out is replaced. A grid's are in line."""
    tried = sum(trial.seed is None and trial.state != "failed" for trial in trials)
    return 0 if sweep.sampler == "grid" else max(sweep.trials - tried, 0)


def repetitions(sweep: Sweep, trials: list[Trial]) -> list[tuple[Trial, int]]:
    """(first run, seed) of the best points of each variant that nobody has tried or put in line with that seed."""
    if sweep.repeat is None:
        return []
    best = [
        trial
        for variant in sweep.variants
        for trial in sorted(
            (
                trial
                for trial in trials
                if trial.params.get(VARIANT) == variant and trial.seed is None and math.isfinite(trial.loss)
            ),
            key=lambda trial: trial.loss,
        )[: sweep.repeat.best]
    ]
    there = [(trial.params, trial.seed) for trial in trials]
    return [(trial, seed) for seed in sweep.repeat.seeds for trial in best if (trial.params, seed) not in there]


def to_come(sweep: Sweep, trials: list[Trial]) -> int:
    """Trials that nobody works on yet, as far as they are known."""
    waiting = sum(trial.state == "waiting" for trial in trials)
    return waiting + new_points(sweep, trials) + len(repetitions(sweep, trials))


def median_rule(prune: Prune, curve: Curve, steps: int, others: Callable[[], list[Curve]]) -> bool:
    """Whether a trial's best loss so far is above the median of the others' best by that step (arXiv:1706.03762's
    successor in Vizier, Golovin et al. 2017, without its averaging). `others` is called when it may apply."""
    if not curve or curve[-1][0] < prune.warmup * steps or curve[-1][0] >= steps:
        return False
    curves = others()
    if len(curves) < prune.startup:
        return False
    step = curve[-1][0]
    medians = [min((loss for at, loss in other if at <= step), default=math.inf) for other in curves]
    return min(loss for _, loss in curve) > statistics.median(medians)


def _finished(trial: Trial, variant: Value) -> bool:
    return trial.params.get(VARIANT) == variant and trial.state in ("done", "diverged")


def _distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {
        key: CategoricalDistribution(space.values)
        if isinstance(space, Choices)
        else FloatDistribution(space.low, space.high, log=True)
        for key, space in sweep.search.items()
    }
    return {**found, VARIANT: CategoricalDistribution(list(sweep.variants))}


def _storage(path: Path, kind: str) -> BaseStorage:
    if kind == "sqlite":
        return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 120}})
    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


def _sampler(sweep: Sweep, trial: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial: its point follows from the study's seed and the trial's number, whoever asks.

    TPE's follows also from the results there are, so that workers side by side come to other points than one alone.
    constant_liar: workers that ask at the same time get points that differ.
    """
    seed = derive(sweep.seed, "sampler", trial) % 2**32
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(constant_liar=True, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _plain(trial: FrozenTrial) -> Trial:
    facts = {key: value for key, value in trial.user_attrs.items() if key not in OURS}
    states: dict[TrialState, State] = {
        TrialState.WAITING: "waiting",
        TrialState.RUNNING: "running",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
        TrialState.COMPLETE: "diverged" if facts.get("ending") == "diverged" else "done",
    }
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    loss = trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else math.nan
    return Trial(trial.number, states[trial.state], params, loss, facts, trial.user_attrs.get("repeat_seed"))


def importance(sweep: Sweep, trials: list[Trial]) -> dict[str, float]:
    """Searched key -> share of the loss's variance that it explains (fANOVA), the highest first.

    Nothing where too few trials ended or nothing varied.
    """
    done = [trial for trial in trials if trial.state == "done"]
    distributions = {
        key: space for key, space in _distributions(sweep).items() if len({trial.params.get(key) for trial in done}) > 1
    }
    if len(done) < 2 * len(distributions) + 2:
        return {}
    study = optuna.create_study()
    for trial in done:
        params = {key: trial.params[key] for key in distributions}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.loss))
    return optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
