"""One job at a time in a run folder."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.run import lock
from mmtrain.run.lock import InUse, RunLock
from tests.run.ranks import on_ranks

HOLDER = """
import os, sys, time
from pathlib import Path
from mmtrain.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if sys.argv[2] == "orphan" and os.fork() == 0:
    os.close(1)
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds tmp_path/run; its stdin ends it."""
    started = []

    def start(kind="alone"):
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), kind]
        environment = {**os.environ, "PYTHONPATH": root, "SLURM_JOB_ID": "4711"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


def test_a_folder_in_use_is_refused_with_both_jobs_named(tmp_path, holder):
    other = holder()
    with pytest.raises(ConfigError) as caught:
        RunLock(tmp_path / "run")
    text = str(caught.value)
    assert f"is in use by process {other.pid} on {socket.gethostname()} (SLURM job 4711) since 2" in text
    assert f"this is process {os.getpid()} on {socket.gethostname()}" in text
    assert text.endswith("Wait for that job, stop it, or choose another out.")


def test_a_killed_job_lets_go_even_when_its_workers_live(tmp_path, holder):
    other = holder("orphan")
    other.kill()
    other.wait(30)
    RunLock(tmp_path / "run").release()


def test_a_job_waits_for_its_own_last_start(tmp_path, holder, monkeypatch):
    other = holder()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            other.kill()
            other.wait()  # with a limit it would sleep, too

    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(InUse):  # another process of this start: a worker of a sweep, say
        RunLock(tmp_path / "run")
    assert not waits
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(InUse):
        RunLock(tmp_path / "run", wait=False)
    assert not waits
    RunLock(tmp_path / "run").release()
    assert len(waits) == 2
    holder()
    monkeypatch.setattr(lock, "PATIENCE", -1.0)
    with pytest.raises(InUse, match=r"is in use by process .* \(SLURM job 4711\)"):
        RunLock(tmp_path / "run")
    assert len(waits) == 2


def test_a_file_system_without_locks_is_not_another_job(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with pytest.raises(ConfigError, match=r"run cannot be locked: .*not implemented.*\(Lustre: -o flock\)"):
        RunLock(tmp_path / "run")


def test_release_lets_the_next_job_in(tmp_path, holder):
    first = RunLock(tmp_path / "run")
    first.release()
    holder()


def test_all_ranks_are_refused_together(tmp_path, holder):
    holder()
    results = on_ranks(2, lambda comm: RunLock(tmp_path / "run", comm))
    assert [type(result) for result in results] == [InUse, InUse]
    assert str(results[0]) == str(results[1])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .*file/run cannot be written: .* Choose another folder"):
        RunLock(tmp_path / "file" / "run")
