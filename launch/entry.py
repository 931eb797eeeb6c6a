"""What all entry points share: quiet libraries, one line for a person's mistake, an exit code for the machine."""

import argparse
import ctypes
import errno
import logging
import os
import sys
import time
from collections.abc import Callable

EXIT_USER_ERROR = 2
OTHERS_WAIT = 4.0  # seconds in which the launcher ends the other ranks, once rank 0 has told the mistake


def setup() -> None:
    """Environment, memory and logging. Before torch and deepspeed are imported."""
    keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    told = logging.StreamHandler(sys.stdout)
    told.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("mmtrain")  # not the root: libraries tell it about their compilers
    ours.addHandler(told)
    ours.propagate = False
    ours.setLevel(logging.INFO if _rank() == 0 else logging.ERROR)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's names, malloc.h."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation of up to 32 MiB, the most that it offers.

    A step on a CPU frees its activations and takes as many again; of what went back to the kernel, every page of 4 KiB
    costs a fault when it returns.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)


def run(main: Callable[[], int]) -> None:
    """Exit with main's code. A UserError becomes one line on stderr and code 2, other errors keep their traceback."""
    try:
        from mmtrain.config.errors import UserError
    except ModuleNotFoundError as error:
        fail(_missing(error))
    try:
        code = main()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        fail(f"{error}: make room, or choose another folder; the last good checkpoint is untouched")
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("mmtrain", "launch", "tools"):
            raise
        fail(_missing(error))
    sys.exit(code)


def fail(message: str) -> None:
    """Print `message` once, from rank 0 if it can, and leave without waiting for other ranks."""
    if _rank():
        time.sleep(OTHERS_WAIT)
        message = f"rank {_rank()}: {message}"
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_USER_ERROR)  # threads and process groups of a run that never began must not hold the exit


def positive(text: str) -> int:
    """argparse type: a number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _rank() -> int:
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or ""
    return int(text) if text.isdecimal() else 0  # parallel.environment tells what is wrong with it


def _missing(error: ModuleNotFoundError) -> str:
    return f"the package {error.name} is missing: pip install -r requirements.txt (or `make test`, which makes .venv)"
