"""launch/slurm.sbatch, with an srun and a scontrol of our own: SLURM itself is not installed where the tests run."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

SRUN = """
    #!{python}
    # Two tasks, each a shell command in TASKS, and of srun what matters here: the first code that is not 0 ends the
    # other task where --kill-on-bad-exit says so, --wait=S ends it S seconds later, and a signal hides the codes.
    import os, subprocess, sys, time
    with open("calls", "a") as calls:
        print("srun", os.environ.get("SRUN_CPUS_PER_TASK"), *sys.argv[1:], file=calls)
    kill = "--kill-on-bad-exit=1" in sys.argv
    wait = min([float(word.removeprefix("--wait=")) for word in sys.argv if word.startswith("--wait=")], default=1e9)
    wait *= float(os.environ.get("FASTER", "1"))
    tasks = [subprocess.Popen("exec " + task, shell=True) for task in os.environ["TASKS"].splitlines()]
    first = None
    while any(task.poll() is None for task in tasks):
        ended = [task.returncode for task in tasks if task.returncode is not None]
        first = first or (time.monotonic() if ended else None)
        if (kill and any(ended)) or (first and time.monotonic() - first > wait):
            for task in tasks:
                task.terminate()
        time.sleep(0.01)
    signals = [128 - task.returncode for task in tasks if task.returncode < 0]
    sys.exit(max(signals or [task.returncode for task in tasks]))
"""
RECORD = """
    #!/bin/sh
    echo "$(basename "$0") $*" >> calls
"""
END, END_LATER = "sh -c 'exit {code}'", "sh -c 'sleep 0.3; exit {code}'"
SAVE = "sh -c 'mkdir -p run/step_00000020; exit {code}'"


class Job(NamedTuple):
    """A job that has ended."""

    code: int
    requeued: bool
    srun: list[str]
    """What each srun was given: cores of a task, then its arguments."""
    stderr: str


@pytest.fixture
def sbatch(tmp_path: Path):
    """Run the script in tmp_path as job 7, with these shell commands as tasks."""
    for name, text in (("srun", SRUN), ("scontrol", RECORD), ("scancel", RECORD)):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(textwrap.dedent(text).lstrip().format(python=sys.executable))
        tool.chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "recipe.yaml").write_text("name: tiny\nout: run\ndata: {tokenizer: none.json}\n")

    def submit(*tasks: str, arguments: tuple[str, ...] = ("recipe.yaml",), **environment: str) -> Job:
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "TASKS": "\n".join(tasks)}
        slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
        command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments]
        ended = subprocess.run(command, env=env | slurm | environment, capture_output=True, text=True, timeout=60)
        path = tmp_path / "calls"
        calls = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        srun = [call.removeprefix("srun ") for call in calls if call.startswith("srun ")]
        return Job(ended.returncode, "scontrol requeue 7" in calls, srun, ended.stderr)

    return submit


def test_a_clean_stop_is_requeued_though_ranks_end_one_after_another(sbatch) -> None:
    job = sbatch(END.format(code=75), END_LATER.format(code=75))
    assert (job.code, job.requeued) == (75, True)


@pytest.mark.parametrize("code", [0, 2, 76])
def test_what_is_done_or_needs_a_person_is_not(sbatch, code: int) -> None:
    job = sbatch(SAVE.format(code=code))
    assert (job.code, job.requeued) == (code, False)


def test_a_failure_is_requeued_as_long_as_each_start_saves_something(sbatch, tmp_path: Path) -> None:
    (tmp_path / "run" / "step_00000010").mkdir(parents=True)
    (tmp_path / "run" / "step_00000030.tmp").mkdir()
    assert sbatch(SAVE.format(code=77))[:2] == (77, True)
    assert sbatch(SAVE.format(code=77))[:2] == (77, False)


def test_a_rank_that_hangs_after_another_has_ended_is_killed(sbatch) -> None:
    job = sbatch(SAVE.format(code=1), "sleep 50", FASTER="0.005")
    assert (job.code, job.requeued) == (143, True)


def test_a_task_gets_the_cores_that_were_asked_for(sbatch) -> None:
    job = sbatch(END.format(code=0), arguments=("recipe.yaml", "steps=3", "--profile=1:2"))
    (call,) = job.srun
    assert call.startswith("12 ") and call.endswith(
        f"{sys.executable} launch/train.py recipe.yaml steps=3 --profile=1:2"
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (1, False)])
def test_a_sweeps_worker_is_requeued_when_it_was_told_to_stop(sbatch, code: int, requeued: bool) -> None:
    job = sbatch(SAVE.format(code=code), arguments=("--sweep", "sweep.yaml"))
    assert (job.code, job.requeued, job.stderr) == (code, requeued, "")
    (call,) = job.srun
    assert call.endswith(f"{sys.executable} launch/sweep.py sweep.yaml")


def test_a_sweeps_job_of_several_tasks_is_refused(sbatch) -> None:
    job = sbatch(END.format(code=0), arguments=("--sweep", "sweep.yaml"), SLURM_NTASKS="16")
    assert (job.code, job.requeued, job.srun) == (2, False, [])
    assert "error: --sweep: a worker is one task, and this job has 16" in job.stderr


def test_a_mistake_in_the_recipe_starts_no_rank(sbatch) -> None:
    job = sbatch(END.format(code=0), arguments=("recipe.yaml", "stepps=3"))
    assert (job.code, job.requeued, job.srun) == (2, False, [])
    assert "error: " in job.stderr and "stepps: unknown key" in job.stderr and "Traceback" not in job.stderr
