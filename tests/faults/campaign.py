"""Random faults in a small training on two ranks: each time the same command must end as if nothing had happened.

    python -m tests.faults.campaign --out DIR [--count 60] [--seed 0]

Kind, rank, step, phase and the time of a signal are drawn by seed; signals come at a time that is uniform over an
undisturbed run, start-up included (SIGSTOP: once the ranks have met). Beside each kind an undisturbed control runs:
what a fault costs is the time of all attempts until the run was done, less that of the control. Storage faults hit the
newest checkpoint of a run that was killed. A run after NaN or a spike is compared with a clean one that is told to
leave out the same step.

Every injection is a line of DIR/injections.jsonl; run the same command again to go on after an interruption. The ranks
are forked from one process that has imported everything, and run launch/train.py's own main. --lock FILE holds a lock
(flock) for each injection, where others use the machine too. Exit code 1 when any injection went wrong.
"""

import argparse
import contextlib
import fcntl
import json
import random
import shutil
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.config.schema import Recipe
from mmtrain.data.loader import STEPS_AHEAD
from mmtrain.data.tokenizer import Tokenizer, train_bpe
from mmtrain.run.guard import EXIT_REQUEUE
from mmtrain.run.heartbeat import EXIT_STALLED, FOLDER
from mmtrain.run.metrics import PHASES
from mmtrain.run.retain import committed
from tests.data.inputs import TEXTS
from tests.faults import flips, job
from tests.faults.compare import difference
from tests.faults.inject import IN_NUMBERS, IN_SAVE, Fault
from tests.faults.job import Attempt, Signal
from tests.train import tiny

SIGNALS = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGUSR1")
STORAGE = ("corrupt file", "missing file", "flipped bit")
INSIDE = ("exception", "hang", "worker killed")
KINDS = (*SIGNALS, *INSIDE, *IN_NUMBERS, *IN_SAVE, *STORAGE)
RANK_0_ALONE = ("killed before the rename", "killed before the clean-up")
STALLS = ("SIGSTOP", "hang")
FIRST_STEP = {"spike": job.SPIKE_WINDOW + 1, **dict.fromkeys(STORAGE, 2 * job.EVERY + 2)}
"""Kind -> first step that it can hit: a median needs steps, and damage to one checkpoint needs another one."""
LAST_STEP = {"worker killed": job.STEPS - STEPS_AHEAD - 1}
"""Kind -> last step: the packs of the last ones are decoded already."""
MET = 0.4
"""Share of a run's time after which the ranks have met. Before that a rank that is stopped is not missed: some come
late. So SIGSTOP waits until each rank has given a sign of life."""


class Draw(NamedTuple):
    """One injection."""

    number: int
    kind: str
    rank: int
    step: int
    phase: str
    share: float
    """For signals: when, as a share of an undisturbed run's time."""


def draw(number: int, seed: int) -> Draw:
    """Injection `number` of a campaign: kinds take turns, all else is random."""
    draws = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    rank = 0 if kind in RANK_0_ALONE else draws.randrange(job.WORLD)
    share = draws.random()
    step = draws.randint(FIRST_STEP.get(kind, 2), LAST_STEP.get(kind, job.STEPS))
    return Draw(number, kind, rank, step, draws.choice(PHASES), share)


class Campaign:
    """The runs of a campaign in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists():
            train_bpe(TEXTS * 3, 400, tokenizer)
        self._tokenizer = Tokenizer(tokenizer)
        if not (folder / "shards").exists():
            tiny.write_shards(folder / "shards", self._tokenizer)
        self._clean: dict[tuple[int, ...], Recipe] = {}
        self._seconds: dict[str, float] = {}

    def _recipe(self, name: str, **options: Any) -> Recipe:
        out = self._folder / name
        shutil.rmtree(out, ignore_errors=True)
        return job.recipe(self._folder / "shards", out / "run", self._tokenizer, **options)

    def _undisturbed(self, kind: str, workers: int) -> float:
        """Seconds of a control for this kind. A first run, slow from cold caches, is what all are compared with."""
        if not self._clean:
            self._clean[()], _ = self._control("control", 0)
        if kind not in self._seconds:
            name = f"control {kind}"
            recipe, self._seconds[kind] = self._control(name, workers)
            if gap := difference(recipe, self._clean[()]):
                raise AssertionError(f"two undisturbed runs differ: {gap}")
            shutil.rmtree(self._folder / name)
        return self._seconds[kind]

    def _control(self, name: str, workers: int) -> tuple[Recipe, float]:
        """An undisturbed run and its seconds."""
        recipe = self._recipe(name, workers=workers)
        ended = job.attempt(recipe, self._folder / name / "log")
        assert ended.codes == [0] * job.WORLD, ended.log
        return recipe, ended.seconds

    def _told_to_skip(self, step: int) -> Recipe:
        """A clean run that leaves out a step."""
        if (step,) not in self._clean:
            name = f"clean without {step}"
            recipe = self._recipe(name, skip_steps=[step])
            ended = job.attempt(recipe, self._folder / name / "log")
            assert ended.codes == [0] * job.WORLD, ended.log
            self._clean[(step,)] = recipe
        return self._clean[(step,)]

    def inject(self, drawn: Draw) -> dict[str, Any]:
        """One injection from start to end: a line of the report."""
        workers = int(drawn.kind == "worker killed")
        control = self._undisturbed(drawn.kind, workers)
        name = f"injection {drawn.number}"
        recipe = self._recipe(name, workers=workers, stall=job.STALL if drawn.kind in STALLS else 60.0)
        logs = self._folder / name / "log"
        first = self._disturbed(recipe, logs, drawn, control)
        attempts = [first]
        if any(first.codes):
            if drawn.kind in STORAGE:
                _damage(Path(recipe.out), drawn, self._seed)
            attempts += job.until_done(recipe, logs)
        left_out = [drawn.step] if drawn.kind in IN_NUMBERS else []
        clean = self._told_to_skip(drawn.step) if left_out else self._clean[()]
        wrong = _wrong(drawn, first, attempts) or difference(recipe, clean, left_out)
        if not wrong:
            shutil.rmtree(self._folder / name)
        return {
            **drawn._asdict(),
            "codes": [attempt.codes for attempt in attempts],
            "resumed": len(attempts) > 1 and "going on after step" in attempts[1].log,
            "seconds": [round(attempt.seconds, 2) for attempt in attempts],
            "control": round(control, 2),
            "lost": round(sum(attempt.seconds for attempt in attempts) - control, 2),
            "wrong": wrong,
        }

    def _disturbed(self, recipe: Recipe, logs: Path, drawn: Draw, control: float) -> Attempt:
        """The attempt that the fault hits."""
        if drawn.kind in SIGNALS:
            seconds, signs = drawn.share * control, ()
            if drawn.kind == "SIGSTOP":
                seconds *= 1.0 - MET
                signs = tuple(Path(recipe.out) / FOLDER / f"rank_{rank:05d}" for rank in range(job.WORLD))
            sent = Signal(getattr(signal, drawn.kind), drawn.rank, seconds, signs)
            return job.attempt(recipe, logs, sent=sent)
        inside = "SIGKILL" if drawn.kind in STORAGE else drawn.kind
        return job.attempt(recipe, logs, Fault(inside, drawn.rank, drawn.step, drawn.phase))


def _damage(run_dir: Path, drawn: Draw, seed: int) -> None:
    """Harm one file of the newest checkpoint, if there is one and an older one is left to go on from."""
    if len(committed(run_dir)) < 2:
        return
    newest = list(committed(run_dir).values())[-1]
    draws = random.Random(f"{seed}/{drawn.number}/damage")
    if drawn.kind == "flipped bit":
        flips.flip(newest, flips.draw(newest, draws.choice(flips.PLACES), draws))
        return
    path = draws.choice(sorted(newest.iterdir()))
    if drawn.kind == "missing file":
        path.unlink()
        return
    content = path.read_bytes()
    first = draws.randrange(len(content))
    path.write_bytes(content[:first] + bytes(len(content) // 3) + content[first + len(content) // 3 :] + b"\0")


def _wrong(drawn: Draw, first: Attempt, attempts: list[Attempt]) -> str:
    """What an injection should not have done, apart from the numbers; empty when all is well."""
    if hung := [number for number, attempt in enumerate(attempts) if attempt.hung]:
        return f"attempt {hung[0]} hung"
    if any(attempts[-1].codes):
        return f"not done after {len(attempts)} attempts: {[attempt.codes for attempt in attempts]}"
    if drawn.kind in (*IN_NUMBERS, "slow disk") and any(first.codes):
        return f"the run did not survive: {first.codes}"
    if drawn.kind in ("exception", "hang", "worker killed") and not any(first.codes):
        return "nothing happened"
    if drawn.kind in STALLS and any(first.codes) and not _named(drawn.rank, first):
        return f"the stalled rank was not named: {first.log[-2000:]}"
    if drawn.kind in ("SIGTERM", "SIGUSR1") and EXIT_REQUEUE in first.codes and set(first.codes) != {EXIT_REQUEUE}:
        return f"the ranks did not agree to stop: {first.codes}"
    return ""


def _named(rank: int, first: Attempt) -> bool:
    """Whether the other rank said who stalled. While the ranks are still joining, nobody knows of anybody."""
    if EXIT_STALLED not in first.codes:
        return False
    told = (f"rank {rank} has stalled", f"rank {rank} stalled in ", "ranks 0, 1 stalled in ")
    return any(words in first.log for words in told)


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A line a kind."""
    kinds = defaultdict(list)
    for line in lines:
        kinds[line["kind"]].append(line)
    yield f"{'kind':<28}{'injections':>11}{'as undisturbed':>16}{'went on':>9}{'seconds lost, median':>22}{'most':>8}"
    for kind in sorted(kinds, key=KINDS.index):
        of_kind = kinds[kind]
        good, resumed = sum(not line["wrong"] for line in of_kind), sum(line["resumed"] for line in of_kind)
        lost = [line["lost"] for line in of_kind]
        yield f"{kind:<28}{len(of_kind):>11}{good:>16}{resumed:>9}{statistics.median(lost):>22.1f}{max(lost):>8.1f}"
    good = sum(not line["wrong"] for line in lines)
    yield f"{'all':<28}{len(lines):>11}{good:>16}{sum(line['resumed'] for line in lines):>9}"


@contextlib.contextmanager
def held(lock: Path | None) -> Iterator[None]:
    """Hold a lock file, if one is given."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lock", type=Path)
    arguments = parser.parse_args()
    campaign = Campaign(arguments.out, arguments.seed)
    path = arguments.out / "injections.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {line["number"] for line in lines}
    for number in sorted(set(range(arguments.count)) - done):
        with held(arguments.lock):
            lines.append(campaign.inject(draw(number, arguments.seed)))
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(json.dumps(lines[-1]), flush=True)
    print(*table(lines), sep="\n")
    return int(any(line["wrong"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
