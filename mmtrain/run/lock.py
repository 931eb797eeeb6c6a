"""One job at a time in a run folder."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.config.errors import ConfigError
from mmtrain.run.comm import Comm, SingleProcess

log = logging.getLogger("mmtrain.run")

NAME = ".lock"
PATIENCE = 180.0  # seconds: twice the lease that Linux's NFS server gives by default
POLL = 5.0


class InUse(ConfigError):
    """Another job holds the folder."""


class RunLock:
    """Holds `OUT/.lock` from construction to `release` or the end of rank 0's process, however that ends.

    A POSIX record lock: it is not inherited by forked data workers, so an orphan of a killed job does not keep the
    folder, and NFS passes it between hosts. (Lustre needs the `flock` mount option.) Rank 0 locks, all ranks agree.
    NFS keeps the lock of a host that died for its lease, so a SLURM job waits PATIENCE seconds for its own last start
    (wait=False: not at all).

    Raises InUse naming both jobs when another one holds the folder; ConfigError when it cannot be written or locked.
    """

    def __init__(self, run_dir: Path, comm: Comm | None = None, wait: bool = True):
        comm = comm or SingleProcess()
        self.run_dir = run_dir
        self._wait = wait
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
        if problem := self._lock(self._file):
            self.release()
            return problem
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _me(), 0)
        return None

    def _lock(self, file: int) -> ConfigError | None:
        """Lock the open file; else say why not."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return ConfigError(
                        f"out: {self.run_dir} cannot be locked: {error}. Mount its file system with locks "
                        "(Lustre: -o flock), or choose another folder."
                    )
            holder, me = _read(os.pread(file, 4096, 0)), _read(_me())
            requeued = me["job"] and holder.get("job") == me["job"] and holder.get("start") != me["start"]
            if not (requeued and self._wait) or time.monotonic() > deadline:
                return InUse(
                    f"out: {self.run_dir} is in use by {_describe(holder)}; this is {_describe(me)}. "
                    "Wait for that job, stop it, or choose another out."
                )
            log.warning("%s is still locked by %s, this job's last start: waiting", self.run_dir, _describe(holder))
            time.sleep(POLL)

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
        "start": os.environ.get("SLURM_RESTART_COUNT", "0"),  # how often the job was requeued
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return json.dumps(who).encode()


def _read(holder: bytes) -> dict[str, Any]:
    """What the lock file holds; empty where that is nothing readable."""
    with contextlib.suppress(ValueError):
        return json.loads(holder)
    return {}


def _describe(who: Mapping[str, Any]) -> str:
    """Words for the holder of a lock."""
    job = f" (SLURM job {who['job']})" if who.get("job") else ""
    return f"process {who.get('pid', '?')} on {who.get('host', 'an unknown host')}{job} since {who.get('since', '?')}"
