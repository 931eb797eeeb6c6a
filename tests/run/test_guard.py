"""Stop flags, and steps that cannot be used."""

import errno
import json
import os
import signal

import pytest

from mmtrain.config import schema
from mmtrain.config.errors import ConfigError
from mmtrain.run.guard import (
    EXIT_REQUEUE,
    EXIT_STOPPED,
    Guard,
    StopFlag,
    TrainingStopped,
    exit_code,
    stop_reason,
)


@pytest.fixture
def flag(tmp_path):
    flag = StopFlag(tmp_path)
    yield flag
    flag.close()


@pytest.mark.parametrize("number, reason", [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_signals(flag, number, reason):
    assert flag.code() == 0
    os.kill(os.getpid(), number)
    assert stop_reason(flag.code()) == reason and exit_code(flag.code()) == EXIT_REQUEUE
    assert flag.code() != 0  # it stays


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    flag = StopFlag(tmp_path)
    assert signal.getsignal(signal.SIGTERM) != before
    flag.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_file_is_not_requeued(flag, tmp_path):
    (tmp_path / "stop").touch()
    assert stop_reason(flag.code()) == "the file stop in the run folder" and exit_code(flag.code()) == EXIT_STOPPED
    again = StopFlag(tmp_path)  # a person who starts the run again wants it to run
    assert again.code() == 0
    again.close()


def test_a_deadline(tmp_path, monkeypatch):
    monkeypatch.setenv("MMTRAIN_DEADLINE", "1000.5")
    monkeypatch.setattr("mmtrain.run.guard.time.time", lambda: now)
    flag = StopFlag(tmp_path)
    now = 1000.0
    assert flag.code() == 0
    now = 1001.0
    assert stop_reason(flag.code()) == "MMTRAIN_DEADLINE has passed" and exit_code(flag.code()) == EXIT_REQUEUE
    flag.close()


def test_a_deadline_that_is_no_time(tmp_path, monkeypatch):
    monkeypatch.setenv("MMTRAIN_DEADLINE", "12:00")
    with pytest.raises(ConfigError, match=r"MMTRAIN_DEADLINE='12:00' is not a Unix time in seconds"):
        StopFlag(tmp_path)


def test_a_disk_that_fails_for_a_moment_is_no_reason(tmp_path, monkeypatch):
    def stale(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    flag = StopFlag(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        code = flag.code()
    flag.close()
    assert code == 0


def test_rank_0_alone_looks_for_the_stop_file(flag, tmp_path):
    other = StopFlag(tmp_path, rank=1)
    (tmp_path / "stop").touch()
    assert (flag.code(), other.code()) == (4, 0)
    other.close()


def test_steps_that_cannot_be_used_are_counted_and_bounded():
    guard = Guard(schema.Guard(max_skips=2, skip_steps=[5]), {"skips": 1})
    assert guard.judge(3, 2.0, 1.0, 9.0, []) == ""
    assert guard.judge(4, float("nan"), float("inf"), 9.0, []) == "loss nan and gradient norm inf"
    assert guard.judge(4, float("nan"), 0.0, 0.0, []) == "no label in the global batch"
    assert guard.judge(5, 2.0, 1.0, 9.0, []) == "listed in guard.skip_steps"
    assert guard.skips == 2
    keys = [f"captions/{number}" for number in range(10)]
    with pytest.raises(TrainingStopped) as caught:
        guard.judge(6, 2.0, float("nan"), 9.0, [keys[:4], keys[4:]])
    text = str(caught.value)
    assert text.startswith("step 6: gradient norm nan; that is unusable step 3 of this run, guard.max_skips is 2.")
    assert "captions/0, captions/1" in text and "and 2 more" in text and "guard.skip_steps" in text


def test_a_spike_is_one_against_the_median_of_enough_usable_steps():
    options = schema.Guard(spike=3.0, spike_window=3)
    guard = Guard(options)
    losses, norms = [2.0, 9.0, 2.2, 6.5, 2.4, 6.7], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    told = [guard.judge(step, *pair, 9.0, []) for step, pair in enumerate(zip(losses, norms, strict=True), 1)]
    # after three steps the median is 2.2, and 6.5 stays below 6.6; after it and 2.4 the median is 2.4: 6.7 < 7.2
    assert told == [""] * 6
    assert guard.judge(7, 2.0, 3.1, 9.0, []) == "gradient norm 3.1 above 3 times 1, the median of 3 steps"
    assert guard.judge(8, 19.6, 1.0, 9.0, []) == "loss 19.6 above 3 times 6.5, the median of 3 steps"
    again = Guard(options, json.loads(json.dumps(guard.as_json())))
    assert again.as_json() == guard.as_json()
    assert again.judge(9, 19.6, 1.0, 9.0, []).startswith("loss 19.6 above 3 times 6.5") and again.skips == 3


def test_without_a_factor_nothing_finite_is_a_spike():
    guard = Guard(schema.Guard(spike_window=1))
    assert guard.judge(1, 1.0, 1.0, 9.0, []) == guard.judge(2, 1e9, 1e9, 9.0, []) == ""


def unusable(guard, *steps):
    """Where the guard would go back before, after each of these steps."""
    found = []
    for step in steps:
        guard.judge(step, float("nan"), 1.0, 9.0, [])
        found.append(guard.go_back_before(step))
    return found


def test_a_row_of_unusable_steps_goes_back_ever_further_and_not_for_ever():
    guard = Guard(schema.Guard(rollback_after=2, max_rollbacks=2, max_skips=99))
    assert unusable(guard, 4) == [0]
    guard.judge(5, 1.0, 1.0, 9.0, [])
    assert guard.go_back_before(5) == 0 and unusable(guard, 6, 7) == [0, 6]  # a usable step ends a row
    guard.went_back(3)
    assert unusable(guard, 8, 9) == [0, 3]  # the weights of step 3 are no better: older than these
    guard.went_back(1)
    again = Guard(schema.Guard(rollback_after=2, max_rollbacks=2, max_skips=99), guard.as_json())
    with pytest.raises(TrainingStopped, match=r"steps 10 to 11 were unusable, after the weights went back 2 times"):
        unusable(again, 10, 11)
    once_usable = Guard(schema.Guard(rollback_after=2, max_rollbacks=3, max_skips=99), guard.as_json())
    once_usable.judge(10, 1.0, 1.0, 9.0, [])
    assert unusable(once_usable, 11, 12) == [0, 11]
    never = Guard(schema.Guard(rollback_after=0, max_skips=99))
    assert unusable(never, *range(1, 9)) == [0] * 8


def test_without_a_checkpoint_the_row_goes_on_until_it_is_as_long_again():
    guard = Guard(schema.Guard(rollback_after=2, max_skips=99))
    assert unusable(guard, 1, 2, 3, 4) == [0, 1, 0, 1]
