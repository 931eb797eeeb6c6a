import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.data import pool
from mmtrain.data.loader import Loader
from tests.data.inputs import tokenizer
from tests.data.streams import make, packs, steps


@pytest.fixture
def busy(folder: Path) -> Iterator[Loader]:
    with Loader(make(folder, workers=2), tokenizer(), 0, 1) as loader:
        yield loader


def test_workers_ignore_what_stops_the_trainer(busy: Loader) -> None:
    stream = iter(busy)
    next(stream)
    for process in busy.worker_pids():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process, number)
    assert len(list(stream)) == 4


def test_a_dead_worker_is_an_error_that_says_so(busy: Loader) -> None:
    stream = iter(busy)
    next(stream)
    for process in busy.worker_pids():
        os.kill(process, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a decoding process \(pid \d+\) died with exit code -9 on a pack"):
        list(stream)


def test_a_pack_whose_message_is_long_waits_for_the_one_before(folder: Path, monkeypatch) -> None:
    whole = [packs(step) for step in steps(make(folder, workers=1))]
    monkeypatch.setattr(pool, "AHEAD_BYTES", 0)
    assert [packs(step) for step in steps(make(folder, workers=1))] == whole


def test_no_memory_for_a_pack_is_an_error_that_says_so(folder: Path, monkeypatch) -> None:
    def full(_: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(pool.SharedMemory, "take", full)
    with pytest.raises(DataError, match=r"no memory for another pack of \d+ bytes .*lower data.workers or data.max_im"):
        steps(make(folder, workers=1))


def test_closing_twice_does_nothing(folder: Path) -> None:
    loader = Loader(make(folder, workers=1), tokenizer(), 0, 1)
    loader.close()
    with Path(os.devnull).open() as file:  # may get the number of what was closed
        loader.close()
        assert os.fstat(file.fileno())


CHILD = """
import sys
from tests.data.inputs import tokenizer
from tests.data.streams import make
from mmtrain.data.loader import Loader
from pathlib import Path
loader = Loader(make(Path(sys.argv[1]), workers=2), tokenizer(), 0, 1)
next(iter(loader))
print(*loader.worker_pids(), flush=True)
sys.stdin.read()
"""


def alive(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_workers_die_with_their_parent(folder: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        cwd=pool.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        workers = [int(number) for number in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        trainer.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def test_workers_import_no_torch() -> None:
    code = "import sys, mmtrain.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pool.ROOT, check=False).returncode == 0
