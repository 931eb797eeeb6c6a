"""Stop flags, and steps that cannot be used."""

import os
import signal

import pytest

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


def test_rank_0_alone_looks_for_the_stop_file(flag, tmp_path):
    other = StopFlag(tmp_path, rank=1)
    (tmp_path / "stop").touch()
    assert (flag.code(), other.code()) == (4, 0)
    other.close()


def test_steps_that_cannot_be_used_are_counted_and_bounded():
    guard = Guard(max_skips=2, skip_steps=[5], skips=1)
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
