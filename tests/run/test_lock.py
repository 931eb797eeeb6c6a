"""One job at a time in a run folder."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError
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


def test_release_lets_the_next_job_in(tmp_path, holder):
    lock = RunLock(tmp_path / "run")
    lock.release()
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
