"""What the jobs of these tests do. The server imports this module once."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch.entry
import launch.stages
import launch.train
import mmtrain.train
import mmtrain.watch
from mmtrain.config.errors import UserError
from mmtrain.config.schema import Recipe
from mmtrain.measure import HeldOut
from mmtrain.run import saver
from mmtrain.train import train
from mmtrain.watch import Watch


def trained(recipe: Recipe) -> int | str:
    """Exit code of `recipe`, or the text of its UserError. Without plots, which cost more than a tiny training."""
    launch.entry.setup()
    mmtrain.watch.draw_plots = lambda *_: []
    try:
        return train(recipe)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def stopped_by_file(recipe: Recipe, after: int) -> int | str:
    """A person makes OUT/stop while the step before `after` ends."""
    _at_report(after - 1, lambda: (Path(recipe.out) / "stop").touch())
    return trained(recipe)


def stopped_by_signal(recipe: Recipe, after: int, rank: int = 0) -> int | str:
    """The scheduler signals `rank` alone."""
    if int(os.environ.get("RANK", "0")) == rank:
        _at_report(after - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return trained(recipe)


def signalled_outside_of_the_loop(recipe: Recipe, function: str) -> int | str:
    """SIGUSR1 when `train` comes to one of the functions that it calls before and after its steps."""
    called = getattr(mmtrain.train, function)

    def after_a_signal(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return called(*arguments, **options)

    setattr(mmtrain.train, function, after_a_signal)
    return trained(recipe)


def killed(recipe: Recipe, during: int, saved: int) -> int | str:
    """SIGKILL in step `during`, once the checkpoint of step `saved` is complete."""
    _at_report(during, lambda: _kill_when_there(Path(recipe.out) / f"step_{saved:08d}"))
    return trained(recipe)


def without_room(recipe: Recipe, from_step: int) -> int | str:
    """The disk is full from the checkpoint of step `from_step` on: a part of each file is written."""
    write = saver.write_shard

    def full(path: Path, pieces: Any) -> Any:
        if int(path.parent.name.removeprefix("step_").removesuffix(".tmp")) < from_step:
            return write(path, pieces)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    saver.write_shard = full
    return trained(recipe)


def with_a_slow_disk(recipe: Recipe, seconds: float) -> int | str:
    """Every file of tensors takes so much longer."""
    write = saver.write_shard

    def slow(path: Path, pieces: Any) -> Any:
        time.sleep(seconds)
        return write(path, pieces)

    saver.write_shard = slow
    return trained(recipe)


def in_order(recipe: Recipe, stop_after: int) -> tuple[int | str, list[str]]:
    """Stopped by a file, on a disk that takes no report: how it ended, and what came when."""
    came: list[str] = []
    measure, save = HeldOut.measure, Watch.save

    def full(*_: Any) -> None:
        came.append("report")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    HeldOut.measure = lambda *rest: (came.append("measure"), measure(*rest))[1]
    Watch.save = lambda *rest, **last: (came.append("save"), save(*rest, **last))[1]
    mmtrain.watch.write_report = full
    return stopped_by_file(recipe, stop_after), came


def held_open(recipe: Recipe, folder: str, step: int) -> list[str]:
    """Files below `folder` that the process has open after `step`."""
    found: list[str] = []

    def look() -> None:
        links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        found.extend(str(link) for link in links if folder in str(link))

    _at_report(step, look)
    assert trained(recipe) == 0
    return found


def command(program: str, arguments: list[str]) -> None:
    """`python launch/PROGRAM.py ARGUMENTS`."""
    sys.argv = [f"launch/{program}.py", *arguments]
    launch.entry.run({"train": launch.train.main, "stages": launch.stages.main}[program])


def command_without(package: str, arguments: list[str]) -> None:
    """`python launch/train.py` where `package` is not installed."""
    for name in [name for name in sys.modules if name.startswith(("mmtrain.", f"{package}."))]:
        if not name.startswith("mmtrain.config"):
            del sys.modules[name]
    sys.modules[package] = None
    command("train", arguments)


def _at_report(step: int, act: Callable[[], None]) -> None:
    """Do `act` when `step` has been reported."""
    report = Watch.report

    def reported(self: Watch, number: int, *rest: Any) -> None:
        report(self, number, *rest)
        if number == step:
            act()

    Watch.report = reported


def _kill_when_there(folder: Path) -> None:
    """SIGKILL this process when `folder` has been committed."""
    deadline = time.monotonic() + 60.0
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
