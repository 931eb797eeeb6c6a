"""One job at a time in a run folder."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.run.comm import Comm, SingleProcess

NAME = ".lock"


class InUse(ConfigError):
    """Another job holds the folder."""


class RunLock:
    """Holds `OUT/.lock` from construction to `release` or the end of rank 0's process, however that ends.

    A POSIX record lock: it is not inherited by forked data workers, so an orphan of a killed job does not keep the
    folder, and NFS passes it between hosts. (Lustre needs the `flock` mount option.) Rank 0 locks, all ranks agree.

    Raises InUse naming both jobs when another one holds the folder; ConfigError when it cannot be written.
    """

    def __init__(self, run_dir: Path, comm: Comm | None = None):
        comm = comm or SingleProcess()
        self.run_dir = run_dir
        self._file: int | None = None
        problem = self._acquire() if comm.rank == 0 else None
        if problem := comm.all_gather_object(problem)[0]:
            raise problem
        self.held = True

    def _acquire(self) -> ConfigError | None:
        """Lock; else say why not."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return ConfigError(f"out: {self.run_dir} cannot be written: {error}. Choose another folder.")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._file, 4096, 0)
            os.close(self._file)
            return InUse(
                f"out: {self.run_dir} is in use by {_describe(holder)}; this is {_describe(_me())}. "
                "Wait for that job, stop it, or choose another out."
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _me(), 0)
        return None

    def check_held(self, run_dir: Path) -> None:
        """Assert that this lock covers `run_dir`."""
        assert self.held and self.run_dir.resolve() == run_dir.resolve(), f"{run_dir} is not locked by this job"

    def release(self) -> None:
        """Let the folder go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self.held = False


def _me() -> bytes:
    who = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return json.dumps(who).encode()


def _describe(holder: bytes) -> str:
    """Words for what the lock file holds."""
    who: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        who = json.loads(holder)
    job = f" (SLURM job {who['job']})" if who.get("job") else ""
    return f"process {who.get('pid', '?')} on {who.get('host', 'an unknown host')}{job} since {who.get('since', '?')}"
