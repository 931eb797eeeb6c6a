"""Training pictures are found by content, whatever their names."""

import re
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.evaluate.overlap import overlap
from tests.data.inputs import picture, write_lines, write_tar
from tests.evaluate import checkpoints


def test_pictures_are_compared_by_content(tmp_path: Path) -> None:
    images = checkpoints.pictures(tmp_path / "images")
    data = write_lines(tmp_path / "vqa.jsonl", [{"image": name} for name in (*checkpoints.COLOURS, "red.png", None)])
    other = picture(colour=(1, 2, 3))
    samples = [
        ("a", {"json": b"{}", "png": other}),
        ("b", {"json": b"{}", "0.png": other, "1.PNG": picture(colour=(9, 9, 9))}),
    ]
    write_tar(tmp_path / "one", samples)
    assert overlap([tmp_path / "one"], data, images) == {
        "evaluation_images": 3,
        "training_images": 2,
        "shared": 0,
        "examples": [],
    }
    tars = write_tar(tmp_path / "two", [("x", {"json": b"{}", "png": (images / "green.png").read_bytes()})])
    found = overlap([tmp_path / "one", tmp_path / "two"], data, images)
    assert (found["training_images"], found["shared"]) == (3, 1)
    assert found["examples"] == [{"image": "green.png", "shard": str(tars[0]), "member": "x.png"}]


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "vqa.jsonl", [{"image": "gone.png"}])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path / 'empty'}: no .tar shards in it; name the folders that")
    ):
        overlap([tmp_path / "empty"], data, tmp_path)
    write_tar(tmp_path / "one", [("a", {"json": b"{}"})])
    with pytest.raises(DataError, match=re.escape(f"{data}: image 'gone.png' cannot be read from {tmp_path} (No such")):
        overlap([tmp_path / "one"], data, tmp_path)
