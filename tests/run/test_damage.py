"""No damage goes unseen, and every message says what to do."""

import shutil

import pytest
import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.run import manifest
from mmtrain.run.comm import SingleProcess
from mmtrain.run.manifest import FileRecord, Manifest
from mmtrain.run.reader import newest, open_checkpoint, open_weights
from mmtrain.run.saver import Saver
from tests.run.ranks import STATE, on_ranks, tiny_tensors, whole


def save(run_dir, *steps, tensors=None):
    saver = Saver(run_dir, SingleProcess(), keep_last=9)
    for step in steps:
        saver.save(
            step,
            [whole(name, t) for name, t in (tensors or tiny_tensors(step)).items()],
            STATE,
            {"tokenizer.json": b"{}"},
        )
    saver.wait()
    return run_dir / f"step_{steps[-1]:08d}"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(tmp_path_factory.mktemp("good"), 1)


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / good.name)


def test_the_untouched_one_opens(folder):
    assert open_checkpoint(folder).names() == sorted(tiny_tensors())


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors", "recipe.yaml", "tokenizer.json"])
def test_every_flipped_bit_is_seen(folder, name):
    path = folder / name
    data = path.read_bytes()
    # every byte of a small file, about 300 places of a large one; another bit each time
    places = range(0, len(data), max(1, len(data) // 300))
    for number, place in enumerate(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << number % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="is damaged"):
            open_checkpoint(folder)
    path.write_bytes(data)
    open_checkpoint(folder)


def test_another_spelling_of_the_hash_is_damage(folder):
    path = folder / manifest.NAME
    data = path.read_bytes()
    body, seal = data[:-80], data[-80:]
    path.write_bytes(body + seal.upper().replace(b"SHA256", b"sha256"))
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors"])
@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_file_is_seen(folder, name, left):
    path = folder / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(folder)


def test_truncation_names_both_sizes(folder):
    path = folder / "rank_00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:50])
    with pytest.raises(
        CheckpointError, match=rf"rank_00000.safetensors has 50 bytes, {len(data)} were written. Name another"
    ):
        open_checkpoint(folder)


def test_a_missing_file_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged: tokenizer.json is missing. Name another checkpoint"):
        open_checkpoint(folder)


def test_a_file_that_the_manifest_does_not_name_is_damage(folder):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes.txt is not in its manifest. Move it out"):
        open_checkpoint(folder)


def test_an_unknown_version_says_both(folder, monkeypatch):
    monkeypatch.setattr(manifest, "VERSION", 2)
    monkeypatch.setattr(manifest, "this_commit", lambda: "0123abc")
    data = manifest.encode(Manifest(1, STATE, {"a": FileRecord(1, "00")}, {}))
    monkeypatch.undo()
    (folder / manifest.NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"has version 2; .* version 1. Read it .* wrote it, commit 0123abc"):
        open_checkpoint(folder)


def test_what_is_not_a_checkpoint_says_why(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    shutil.copytree(folder, tmp_path / "step_00000002.tmp")
    (tmp_path / "step_00000002.tmp" / manifest.NAME).unlink()
    for name, message in {
        "nowhere": r"nowhere: no such folder. Name a step folder",
        "empty": r"empty is not a checkpoint: it holds no manifest.json \(0 other files\)",
        "hf": r"holds model.safetensors but no manifest.json. .* tools.convert hf-to-mm",
        "step_00000002.tmp": r"is what an unfinished save left behind; it was never committed",
        ".": r"is a run folder. Name one of its checkpoints: step_00000001",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


def test_all_ranks_refuse_what_one_of_them_found(folder):
    path = folder / "tokenizer.json"  # the last name: not rank 0's share
    path.write_bytes(b"[]")
    results = on_ranks(3, lambda comm: open_checkpoint(folder, comm))
    assert len({str(result) for result in results}) == 1
    assert all(isinstance(result, CheckpointError) and "tokenizer.json has sha256" in str(result) for result in results)


def test_newest_passes_over_damage_loudly(tmp_path, caplog):
    save(tmp_path, 1, 2, 3)
    shard = tmp_path / "step_00000003" / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    (tmp_path / "step_00000004").mkdir()
    reader = newest(tmp_path)
    assert reader.manifest.step == 2
    assert torch.equal(reader.read("e.experts.up"), tiny_tensors(2)["e.experts.up"])
    lines = [record.message for record in caplog.records]
    assert lines[0].startswith("CHECKPOINT PASSED OVER") and "step_00000004 is not a checkpoint" in lines[0]
    assert "step_00000003 is damaged: rank_00000.safetensors has sha256" in lines[1]
    assert lines[2].startswith("going on from") and lines[2].endswith("step_00000002, the newest good one")
    assert open_weights(tmp_path).manifest.step == 2
    assert open_weights(tmp_path / "step_00000001").manifest.step == 1


def test_newest_of_nothing_is_none_and_of_damage_only_an_error(tmp_path):
    assert newest(tmp_path / "not_yet") is None
    assert newest(tmp_path) is None
    save(tmp_path, 5)
    (tmp_path / "step_00000005" / "recipe.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"all 1 checkpoints are damaged \(step_00000005\). Restore one from a copy"
    ):
        newest(tmp_path)
