"""Who stalls is named; who lives is left alone. Ranks are threads here; tests/faults stops and hangs real ones."""

import errno
import json
import os
import time
from pathlib import Path

import pytest

from mmtrain.run import heartbeat
from mmtrain.run.comm import SingleProcess
from mmtrain.run.heartbeat import EXIT_STALLED, WAITING, Beat, Heartbeat
from tests.run.ranks import on_ranks

TWO, SECOND = SingleProcess(0, 2), SingleProcess(1, 2)
"""Rank 0 and rank 1 of two; the other one is a file."""


@pytest.fixture
def ends(monkeypatch):
    """Exit codes that threads asked for, again and again."""
    codes = []
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    monkeypatch.setattr(heartbeat, "_LAST_WORDS", 0.3)
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda file: None)
    return codes


def wait_for(what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def beat(path, **changes):
    """A rank's file as another process would write it."""
    values = {"count": 1, "place": 5, "step": 4, "phase": "forward", "seconds": 0.1, "late": False, "failed": ""}
    path.write_text(json.dumps(list((values | changes).values())))


def test_ranks_that_end_leave_nothing(tmp_path, ends):
    def work(comm):
        with Heartbeat(tmp_path, comm, 60.0) as heart:
            heart.at(1, "forward")
            comm.barrier()

    assert on_ranks(3, work) == [None] * 3
    assert ends == [] and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_rank_without_a_sign_of_life_is_named(tmp_path, ends, capsys):
    with Heartbeat(tmp_path, TWO, 0.5):
        beat(tmp_path / ".beats" / "rank_00001", step=7, phase="backward")
        wait_for(lambda: ends)
        told = json.loads((tmp_path / ".beats" / "rank_00000").read_text())[-1]
    assert set(ends) == {EXIT_STALLED}
    expected = "rank 1 has stalled: no sign of life for "
    assert told.startswith(expected) and told.endswith("last seen in backward of step 7")
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_the_others_name_rank_0(tmp_path, ends, capsys):
    (tmp_path / ".beats").mkdir()
    with Heartbeat(tmp_path, SECOND, 0.3):
        wait_for(lambda: ends)
    assert "rank 0 has stalled: no sign of life for 0 s, never seen" in capsys.readouterr().err


def test_what_rank_0_has_found_ends_the_others_without_a_word(tmp_path, ends, capsys):
    (tmp_path / ".beats").mkdir()
    beat(tmp_path / ".beats" / "rank_00000", failed="rank 5 has stalled")
    with Heartbeat(tmp_path, SECOND, 0.5):
        wait_for(lambda: ends)
    assert set(ends) == {EXIT_STALLED} and capsys.readouterr().err == ""


def seen(rank, since, **changes):
    """What rank 0 has read of another rank, and when that changed last."""
    values = {"count": 1, "place": 5, "step": 4, "phase": "forward", "seconds": 0.1, "late": False, "failed": ""}
    return {rank: (Beat(**(values | changes)), since)}


def problem(heart, others, now):
    """What rank 0 finds."""
    heart._write()
    return heart._problem(others, now)


@pytest.fixture
def still(tmp_path):
    """Rank 0 of two whose thread does not run, in the second forward of step 4: its fifth place."""
    heart = Heartbeat(tmp_path, TWO, 0.0)
    heart._limit = 60.0
    (tmp_path / ".beats").mkdir()
    for step in (3, 4):
        heart.at(step, "data_wait")
        heart.at(step, "forward")
    heart.at(4, WAITING + "forward")
    return heart


def test_a_count_that_moves_in_time_is_a_living_rank(still):
    assert problem(still, seen(1, 100.0), 159.0) is None
    assert problem(still, seen(1, 100.0), 161.0)[0].startswith("rank 1 has stalled: no sign of life for 61 s")


def test_of_those_that_wait_the_one_that_has_come_least_far_is_meant(still):
    late = seen(1, 0.0, seconds=75.0, late=True)
    assert problem(still, late, 1.0) == ("ranks 0, 1 stalled in forward of step 4 for 75 s", False)
    behind = seen(1, 0.0, place=4, seconds=80.0, late=True, phase="data_wait") | seen(2, 0.0, place=6, late=True)
    assert problem(still, behind, 1.0) == ("rank 1 stalled in data_wait of step 4 for 80 s", False)
    ahead = seen(1, 0.0, place=6, late=True)  # waits for this rank
    assert problem(still, ahead, 1.0)[0].startswith("rank 0 stalled in waiting after forward of step 4 for ")


def test_who_waits_for_what_may_take_any_time_waits(still):
    still.at(4, "report")
    assert problem(still, seen(1, 0.0, place=9, phase="data_wait", late=True), 1.0) is None


def lateness(heart, monkeypatch, seconds):
    """Whether rank 0 finds itself late after so many seconds where it is."""
    start = heart._place[3]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: start + seconds)
    heart._write()
    return heart._beat.late


def test_a_phase_may_take_the_limit_and_ten_times_as_long_as_ever(still, monkeypatch):
    still._longest["forward"] = 2.0
    still.at(5, "forward")
    assert [lateness(still, monkeypatch, seconds) for seconds in (60.0, 79.0, 81.0)] == [False, False, True]
    still.at(5, "update")  # for the first time
    assert not lateness(still, monkeypatch, 1e5)
    still.at(5, "save")
    still.at(6, "save")
    assert not lateness(still, monkeypatch, 1e5)


def test_a_rank_that_fails_leaves_its_words(tmp_path, ends):
    with pytest.raises(ValueError, match="no way"), Heartbeat(tmp_path, SingleProcess(), 5.0):
        raise ValueError("no way")
    assert json.loads((tmp_path / ".beats" / "rank_00000").read_text())[-1] == "rank 0 failed: ValueError: no way"
    with Heartbeat(tmp_path, SingleProcess(), 5.0):  # the next start forgets them
        assert not (tmp_path / ".beats" / "rank_00000").exists()


def test_a_full_disk_ends_nobody(tmp_path, ends, monkeypatch):
    """What needs new room fails from the first beat on: another file, or more than a file holds."""
    create, write = os.open, os.pwrite

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, flags, *mode):
        return create(path, flags, *mode) if Path(path).exists() and not flags & os.O_TRUNC else full()

    def written(file, data, offset):
        return write(file, data, offset) if offset + len(data) <= os.fstat(file).st_size else full()

    def count():
        return json.loads((tmp_path / ".beats" / "rank_00000").read_text())[0]

    with Heartbeat(tmp_path, SingleProcess(), 0.3) as heart:
        wait_for(lambda: (tmp_path / ".beats" / "rank_00000").exists() and heart._beat)
        monkeypatch.setattr(Path, "write_text", full)
        monkeypatch.setattr(heartbeat.os, "open", opened)
        monkeypatch.setattr(heartbeat.os, "pwrite", written)
        before = heart._beat.count + 1
        wait_for(lambda: count() > before)
        heart.at(10**6, "a phase with a longer name than before")
        wait_for(lambda: json.loads((tmp_path / ".beats" / "rank_00000").read_text())[2] == 10**6)
    assert ends == []


def test_long_words_are_cut_to_the_file(tmp_path, ends):
    with pytest.raises(ValueError), Heartbeat(tmp_path, SingleProcess(), 5.0):
        raise ValueError("\x01\U0001f600" * 5000)
    said = (tmp_path / ".beats" / "rank_00000").read_bytes()
    assert len(said) == heartbeat._BYTES and json.loads(said)[-1].startswith(
        "rank 0 failed: ValueError: \x01\U0001f600"
    )


def test_zero_watches_nobody(tmp_path):
    with Heartbeat(tmp_path, SingleProcess(), 0.0) as heart:
        heart.at(1, "forward")
    assert list(tmp_path.iterdir()) == []
