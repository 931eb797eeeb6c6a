"""The trials of a sweep, shared by all its workers: an Optuna study in one file of the sweep's folder.

Any number of processes on any number of machines that see the folder may work on one study. A worker holds a lock in
OUT/claims/NUMBER while it works on trial NUMBER; the lock goes with the process, so a trial that is called running but
is locked by nobody was interrupted, and the next worker goes on with it.
"""

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
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
from mmtrain.run.lock import RunLock
from mmtrain.sweep.spec import VARIANT, Choices, Prune, Sweep, Value
from mmtrain.sweep.trial import Curve, Judge, Outcome

FILES = {"journal": "study.journal", "sqlite": "study.db"}

State = Literal["waiting", "running", "done", "diverged", "pruned"]


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
        if not create and not (sweep.out / FILES[sweep.storage]).exists():
            raise ConfigError(f"{sweep.out}: no study yet; start it with python launch/sweep.py {sweep.file}")
        sweep.out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._storage = _storage(sweep.out / FILES[sweep.storage], sweep.storage)
            self._study = optuna.create_study(
                storage=self._storage, sampler=_sampler(sweep, 0), study_name=sweep.name, load_if_exists=True
            )
        self._distributions = _distributions(sweep)
        if create:
            with self._turn():
                self._begin()

    def trials(self) -> list[Trial]:
        """All trials, in the order of their numbers; those that an error ended are left out."""
        return [_plain(trial) for trial in self._study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]

    def claim(self) -> Claim | Literal["wait"] | None:
        """The next trial for this worker: an interrupted one first; "wait" while others decide; None at the end."""
        with self._turn():
            trials = self.trials()
            for trial in trials:
                if trial.state == "running" and (lock := self._lock(trial.number)):
                    return Claim(trial.number, trial.params, trial.seed, lock)
            waiting = any(trial.state == "waiting" for trial in trials)
            first = sum(trial.seed is None for trial in trials)
            if not waiting and self.sweep.sampler != "grid" and first < self.sweep.trials:
                return self._ask()
            if waiting:
                return self._ask()
            if any(trial.state == "running" for trial in trials):
                return "wait" if self.sweep.repeat else None
            return self._ask() if self._enqueue_repetitions(trials) else None

    def finish(self, claim: Claim, outcome: Outcome, found: dict[str, Any]) -> None:
        """Keep what a trial came to. An interrupted one stays running, for whoever comes next."""
        if outcome.ending != "interrupted":
            trial = optuna.trial.Trial(self._study, self._study.get_trials(deepcopy=False)[claim.number]._trial_id)
            for key, value in found.items():
                trial.set_user_attr(key, value)
            if outcome.ending == "pruned":
                last = min((loss for _, loss in outcome.curve), default=math.inf)
                trial.report(last, outcome.steps)  # Optuna's samplers learn from it
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, outcome.loss)
        claim.lock.release()

    def let_go(self, claim: Claim) -> None:
        """Count a trial out that an error ended."""
        self._study.tell(claim.number, state=TrialState.FAIL)
        claim.lock.release()

    def judge(self, claim: Claim, steps: int) -> Judge:
        """The median rule for a claimed trial of `steps` steps."""
        prune = self.sweep.prune
        variant = claim.params[VARIANT]
        return lambda curve: (
            prune is not None
            and median_rule(
                prune,
                curve,
                steps,
                lambda: [trial.facts["curve"] for trial in self.trials() if _finished(trial, variant)],
            )
        )

    def _begin(self) -> None:
        """Once in a study's life: what it is, and the points of a grid."""
        mine, known = _identity(self.sweep), self._study.user_attrs.get("sweep")
        if known is None:
            for point in self.sweep.points() if self.sweep.sampler == "grid" else ():
                self._study.enqueue_trial(point)
            self._study.set_user_attr("sweep", mine)
        elif known != mine:
            changed = sorted(key for key in mine if mine[key] != known.get(key))
            raise ConfigError(
                f"{self.sweep.out} holds the study of another sweep: {', '.join(changed)} differ; choose another out, "
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

    def _enqueue_repetitions(self, trials: list[Trial]) -> bool:
        """Put the best points of each variant in line with the other seeds, once; whether there are any."""
        repeat = self.sweep.repeat
        if repeat is None or any(trial.seed is not None for trial in trials):
            return False
        best = [
            trial
            for variant in self.sweep.variants
            for trial in sorted(
                (trial for trial in trials if trial.params[VARIANT] == variant and math.isfinite(trial.loss)),
                key=lambda trial: trial.loss,
            )[: repeat.best]
        ]
        for seed in repeat.seeds:
            for trial in best:
                self._study.enqueue_trial(trial.params, user_attrs={"repeat_seed": seed, "repeat_of": trial.number})
        return bool(best)

    def _lock(self, number: int) -> RunLock | None:
        """The lock on a trial; None while another process holds it."""
        try:
            return RunLock(self.sweep.out / "claims" / f"{number:04d}")
        except ConfigError:
            return None

    def _turn(self) -> "_Turn":
        return _Turn(self.sweep.out / "claims")


class _Turn:
    """One worker at a time decides who does what."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        deadline = time.monotonic() + 120.0
        while True:
            try:
                self._held = RunLock(self._folder)
                return
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._held.release()


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


def _identity(sweep: Sweep) -> dict[str, Any]:
    """What must not change while a study goes on, as JSON values."""
    space = {
        key: list(found.values) if isinstance(found, Choices) else {"low": found.low, "high": found.high}
        for key, found in sweep.search.items()
    }
    return json.loads(
        json.dumps(
            {
                "recipe": str(sweep.recipe),
                "sampler": sweep.sampler,
                "seed": sweep.seed,
                "objective": sweep.objective,
                "set": sweep.set,
                "variants": sweep.variants,
                "search": space,
                "parent": None if sweep.parent is None else [str(sweep.parent.recipe), sweep.parent.set],
                "budget": None if sweep.budget is None else [sweep.budget.tokens, sweep.budget.flops],
            }
        )
    )


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
    """The sampler of one trial, so that neither the number of workers nor a restart changes the points of a study.

    constant_liar: workers that ask at the same time get points that differ.
    """
    seed = derive(sweep.seed, "sampler", trial) % 2**32
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(constant_liar=True, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _plain(trial: FrozenTrial) -> Trial:
    facts = {key: value for key, value in trial.user_attrs.items() if not key.startswith("repeat_")}
    states: dict[TrialState, State] = {
        TrialState.WAITING: "waiting",
        TrialState.RUNNING: "running",
        TrialState.PRUNED: "pruned",
        TrialState.COMPLETE: "diverged" if facts.get("ending") == "diverged" else "done",
    }
    params = trial.params or trial.system_attrs.get("fixed_params", {})
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
