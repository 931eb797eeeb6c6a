"""What every entry point does first."""

import resource
import subprocess
import sys

import pytest

from launch.entry import keep_freed_memory

BLOCK = 16 << 20


def step() -> None:
    """Take and write eight blocks, as a step takes activations, then free them all."""
    blocks = [bytearray(b"x") * BLOCK for _ in range(8)]
    blocks.clear()


def faults_of_ten_steps() -> int:
    """Pages that the kernel had to hand out in the meantime."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_memory_that_was_freed_is_used_again() -> None:
    pages = 8 * BLOCK // resource.getpagesize()
    found = [
        int(subprocess.run([sys.executable, "-m", "tests.test_entry", how], capture_output=True, check=True).stdout)
        for how in ("as it is", "kept")
    ]
    assert found[0] > 5 * pages, "the kernel takes back what is freed; nothing to see here otherwise"
    assert found[1] < pages / 10


if __name__ == "__main__":
    if sys.argv[1] == "kept":
        keep_freed_memory()
        step()
    print(faults_of_ten_steps())
