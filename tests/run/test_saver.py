"""Saving beside training: what is committed, what stays, what a failure or a kill leaves."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.parallel.box import Box
from mmtrain.run import retain, saver, shards
from mmtrain.run.comm import SingleProcess
from mmtrain.run.lock import RunLock
from mmtrain.run.manifest import RunState
from mmtrain.run.reader import newest, open_checkpoint
from mmtrain.run.retain import clean_leftovers, committed, surplus
from mmtrain.run.saver import Saver
from tests.run.ranks import STATE, on_ranks, part, tiny_tensors, whole


def pieces(seed=0):
    return [whole(name, tensor) for name, tensor in tiny_tensors(seed).items()]


def measured(loss):
    return RunState(1, "", {}, "h", metrics={"held_out_loss": loss})


def names(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def test_ranks_write_one_checkpoint(tmp_path):
    tensor = torch.arange(24.0).view(4, 6)

    def work(comm):
        box = Box.whole(tensor.shape).cut(1, comm.rank // 2, 2)  # tensor cut, then two flat ranges
        half = (0, 5) if comm.rank % 2 == 0 else (5, 12)
        save = Saver(tmp_path, comm)
        save.save(10, [part("w", tensor, box, half), whole("replica", torch.ones(2))], STATE, {"tokenizer.json": b"{}"})
        save.wait()
        return open_checkpoint(tmp_path / "step_00000010", comm).read("w")

    for read in on_ranks(4, work):
        assert torch.equal(read, tensor)
    shard_names = [f"rank_{rank:05d}.safetensors" for rank in range(4)]
    assert names(tmp_path / "step_00000010") == sorted(["manifest.json", "recipe.yaml", "tokenizer.json", *shard_names])
    assert names(tmp_path) == ["step_00000010"]


def test_training_goes_on_while_the_thread_writes(tmp_path, monkeypatch):
    released = threading.Event()
    write = saver.write_shard

    def slow_write(path, held):
        assert released.wait(30)
        return write(path, held)

    monkeypatch.setattr(saver, "write_shard", slow_write)
    live = torch.zeros(4)
    save = Saver(tmp_path, SingleProcess())
    save.save(1, [whole("w", live)], STATE)
    assert committed(tmp_path) == {}
    live.add_(1)  # the next step; the checkpoint holds what was there before
    released.set()
    save.save(2, [whole("w", live)], STATE)
    save.wait()
    assert list(committed(tmp_path)) == [1, 2]
    assert open_checkpoint(tmp_path / "step_00000001").read("w").tolist() == [0, 0, 0, 0]
    assert open_checkpoint(tmp_path / "step_00000002").read("w").tolist() == [1, 1, 1, 1]


def test_the_last_save_needs_no_second_copy(tmp_path, monkeypatch):
    held = []
    write = saver.write_shard
    monkeypatch.setattr(saver, "write_shard", lambda path, pieces: write(path, held.extend(pieces) or pieces))
    live = torch.arange(8.0)
    save = Saver(tmp_path, SingleProcess())
    save.save(1, [whole("w", live)], STATE)
    save.save(2, [whole("w", live + 1)], STATE, last=True)
    save.save(3, [whole("w", live), whole("v", live[:6:2])], STATE, last=True)
    save.wait()
    copies = [values.untyped_storage().data_ptr() == live.untyped_storage().data_ptr() for _, values in held]
    assert copies == [False, False, True, False]  # a copy, another, itself, not contiguous
    assert open_checkpoint(tmp_path / "step_00000002").read("w").tolist() == (live + 1).tolist()
    assert open_checkpoint(tmp_path / "step_00000003").read("v").tolist() == [0, 2, 4]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_good_one_and_training(tmp_path, monkeypatch, caplog):
    save = Saver(tmp_path, SingleProcess())
    save.save(1, pieces(1), STATE)
    save.wait()
    monkeypatch.setattr(shards.os, "fsync", no_space)
    save.save(2, pieces(2), STATE)
    save._thread.join()
    assert names(tmp_path) == ["step_00000001"]
    (line,) = caplog.records
    assert line.levelname == "ERROR"
    assert "CHECKPOINT NOT SAVED: step_00000002: [Errno 28] No space left on device" in line.message
    save.save(3, pieces(3), STATE)  # a failed periodic save does not stop training
    with pytest.raises(
        CheckpointError, match=r"NOT SAVED: step_00000003: .*No space.* The last good checkpoint is step 1 in"
    ):
        save.wait()  # the last one does
    monkeypatch.undo()
    save.save(4, pieces(4), STATE)
    save.wait()
    assert list(committed(tmp_path)) == [1, 4]


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full, a device that is always full")
def test_a_real_full_device(tmp_path):
    entry_and_tensor = [(saver.Entry.of(piece), piece.tensor) for piece in pieces()]
    with pytest.raises(OSError, match="No space left"):
        shards.write_shard(Path("/dev/full"), entry_and_tensor)


def test_no_room_even_for_the_folder(tmp_path, monkeypatch, caplog):
    save = Saver(tmp_path / "run", SingleProcess())
    monkeypatch.setattr(Path, "mkdir", no_space)
    save.save(1, pieces(), STATE)
    assert "CHECKPOINT NOT SAVED: step_00000001" in caplog.text
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        save.wait()


def test_one_rank_without_room_fails_the_save_on_all(tmp_path, monkeypatch):
    write = saver.write_shard
    monkeypatch.setattr(
        saver, "write_shard", lambda path, held: no_space() if "00001" in path.name else write(path, held)
    )

    def work(comm):
        save = Saver(tmp_path, comm, time_limit=20)
        save.save(1, pieces(), STATE)
        save.wait()

    for error in on_ranks(2, work):
        assert isinstance(error, CheckpointError)
        assert "rank 1 could not write its file: [Errno 28] No space left" in str(error)
    assert names(tmp_path) == []


def test_a_silent_rank_is_named_when_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "_vote", lambda *_: None)
    save = Saver(tmp_path, SingleProcess(), time_limit=0.1)
    save.save(1, pieces(), STATE)
    with pytest.raises(CheckpointError, match=r"no file from rank 0 of 1 after 0.1 s"):
        save.wait()
    assert names(tmp_path) == []


def test_a_mistake_in_the_thread_surfaces_at_the_next_call(tmp_path):
    save = Saver(tmp_path, SingleProcess())
    save.save(1, pieces(), RunState(1, "", {}, "h", metrics={"held_out_loss": float("nan")}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        save.save(2, pieces(), STATE)
    assert names(tmp_path) == []


def test_the_same_step_again_replaces_a_damaged_one(tmp_path):
    save = Saver(tmp_path, SingleProcess())
    save.save(1, pieces(1), STATE)
    save.wait()
    (tmp_path / "step_00000001" / "recipe.yaml").unlink()
    save.save(1, pieces(2), STATE)
    save.wait()
    assert torch.equal(newest(tmp_path).read("scalar"), tiny_tensors(2)["scalar"])
    assert names(tmp_path) == ["step_00000001"]


KILLED = """
    import os, signal, sys, threading, time
    from pathlib import Path
    import torch
    from mmtrain.run import saver, retain
    from mmtrain.run.comm import SingleProcess
    from tests.run.ranks import STATE, whole

    run_dir, where = Path(sys.argv[1]), sys.argv[2]

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    save = saver.Saver(run_dir, SingleProcess(), keep_last=1)
    save.save(1, [whole("w", torch.ones(1000))], STATE)
    save.wait()
    if where == "file":  # half of the tensors written
        write = saver.write_shard
        saver.write_shard = lambda path, held: (path.write_bytes(b"half"), die())
    elif where == "vote":
        saver._vote = die
    elif where == "manifest":
        saver.write_file = die
    elif where == "rename":
        saver.sync_folder = die
    elif where == "removal":
        retain.shutil.rmtree = die
    save.save(2, [whole("w", torch.zeros(1000))], STATE)
    save.wait()
    print("survived")
"""


@pytest.mark.parametrize(
    "where, step", [("file", 1), ("vote", 1), ("manifest", 1), ("rename", 1), ("removal", 2), ("nowhere", 2)]
)
def test_kill_9_in_the_middle_of_a_save(tmp_path, where, step, caplog):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    run_dir = tmp_path / "run"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(run_dir), where],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
    )
    assert done.returncode == (0 if where == "nowhere" else -signal.SIGKILL)
    reader = newest(run_dir)
    assert reader.manifest.step == step
    assert torch.equal(reader.read("w"), torch.ones(1000) if step == 1 else torch.zeros(1000))
    assert not caplog.records  # nothing committed is damaged
    leftovers = [name for name in names(run_dir) if name.endswith(".tmp")]
    assert len(leftovers) == (0 if where == "nowhere" else 1)
    lock = RunLock(run_dir)
    clean_leftovers(run_dir, lock)
    lock.release()
    assert not [name for name in names(run_dir) if name.endswith(".tmp")]
    save = Saver(run_dir, SingleProcess())  # and the run goes on
    save.save(2, [whole("w", torch.zeros(1000))], STATE)
    save.wait()
    assert newest(run_dir).manifest.step == 2


def test_leftovers_go_only_with_the_lock(tmp_path):
    (tmp_path / "step_00000003.tmp").mkdir()
    lock = RunLock(tmp_path)
    lock.release()
    with pytest.raises(AssertionError, match="is not locked by this job"):
        clean_leftovers(tmp_path, lock)
    assert clean_leftovers(tmp_path, RunLock(tmp_path)) == [tmp_path / "step_00000003.tmp"]


def test_leftovers_that_cannot_go_stop_nobody(tmp_path, monkeypatch, caplog):
    def busy(_):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    (tmp_path / "step_00000003.tmp").mkdir()
    monkeypatch.setattr(retain.shutil, "rmtree", busy)
    clean_leftovers(tmp_path, RunLock(tmp_path))
    assert "step_00000003.tmp, left by a save that was interrupted, cannot be removed: " in caplog.text


def test_a_dead_training_thread_does_not_hold_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "_vote", lambda *_: None)
    monkeypatch.setattr(saver, "_GRACE", 0.05)
    gone = threading.Thread()
    monkeypatch.setattr(saver.threading, "main_thread", lambda: gone)
    save = Saver(tmp_path, SingleProcess(), time_limit=300)
    start = time.monotonic()
    save.save(1, pieces(), STATE)
    save._thread.join()
    assert time.monotonic() - start < 200


@pytest.mark.parametrize(
    "options, stay",
    [
        ({"keep_last": 2}, [4, 5]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 5]),
        ({"keep_last": 1, "keep_best": True}, [3, 5]),
        ({"keep_last": 0}, [5]),
    ],
)
def test_what_stays(tmp_path, options, stay):
    save = Saver(tmp_path, SingleProcess(), **options)
    for step, loss in enumerate([3.0, 2.5, 2.0, 2.2, 2.1], start=1):
        save.save(step, pieces(), measured(loss))
    save.wait()
    assert list(committed(tmp_path)) == stay
    assert [name for name in names(tmp_path) if name.endswith(".tmp")] == []


def test_leftovers_of_a_longer_run_push_nothing_out():
    # step 100 was damaged in its tensors, the run went on from 50: 75 must not count 100 as the newest
    assert surplus({50: {}, 75: {}, 100: {}}, current=75, keep_last=2, keep_every=0, keep_best=False) == []
    assert surplus({50: {}, 75: {}, 100: {}}, current=75, keep_last=1, keep_every=0, keep_best=False) == [50]
    # of two equally good ones, the later
    losses = {1: {"held_out_loss": 2.0}, 2: {"held_out_loss": 2.0}, 3: {}}
    assert surplus(losses, current=3, keep_last=1, keep_every=0, keep_best=True) == [1]


def test_a_damaged_manifest_is_neither_counted_nor_removed(tmp_path, caplog):
    save = Saver(tmp_path, SingleProcess(), keep_last=2)
    for step in (1, 2, 3):
        save.save(step, pieces(), STATE)
        save.wait()
        if step == 2:
            (tmp_path / "step_00000002" / "manifest.json").write_text("{}")
    assert list(committed(tmp_path)) == [1, 2, 3]
    assert "left alone while old checkpoints were removed" in caplog.text


def test_an_old_checkpoint_that_cannot_go_does_not_fail_the_save(tmp_path, monkeypatch, caplog):
    save = Saver(tmp_path, SingleProcess(), keep_last=1)
    save.save(1, pieces(), STATE)
    save.wait()
    monkeypatch.setattr(retain.shutil, "rmtree", no_space)
    save.save(2, pieces(), STATE)
    save.wait()
    assert "step 2 is saved, but an old checkpoint could not be removed" in caplog.text
    assert newest(tmp_path).manifest.step == 2
