"""index_shards, inspect_shards and plan_data on small real shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmtrain.config.load import dump
from mmtrain.config.schema import Source
from mmtrain.data.index import open_folder, read_index
from mmtrain.data.loader import Loader
from mmtrain.data.plan import Planner
from tests.data import plans
from tests.data.inputs import picture, tokenizer, write_tar
from tests.data.streams import folder, make
from tools import index_shards, inspect_shards, plan_data

__all__ = ["folder"]

Read = Callable[[], str]


@pytest.fixture
def read(capsys: pytest.CaptureFixture) -> Read:
    """What was printed since the last call, errors included."""
    return lambda: "".join(capsys.readouterr())


@pytest.fixture
def foreign(folder: Path, tmp_path: Path) -> Path:
    """Tars without indexes: good ones, one with a bad image, one that is no tar."""
    where = tmp_path / "foreign"
    where.mkdir()
    for tar in (folder / "captions").glob("*.tar"):
        shutil.copy(tar, where / f"good-{tar.name}")
    write_tar(where, [("k", {"jpg": b"no picture", "txt": b"x"}), ("fine", {"jpg": picture(), "txt": b"y"})])
    (where / "broken.tar").write_bytes(b"no tar" * 200)
    return where


def index(*arguments: object) -> int:
    return index_shards.main([*map(str, arguments), "--tokenizer", str(tokenizer().path)])


@pytest.mark.parametrize("processes", [1, 2])
def test_foreign_tars_are_indexed_and_the_rest_reported(
    foreign: Path, folder: Path, read: Read, processes: int
) -> None:
    assert index(foreign, "--processes", processes) == 1
    printed = read()
    assert "7 shards, 0 indexed before" in printed and "62 samples indexed, 1 of them unusable; 1 shards" in printed
    assert f"{foreign / 'broken.tar'}: shard {foreign / 'broken.tar'}: not a readable tar" in printed
    lines = [json.loads(line) for line in (foreign / "unusable.jsonl").read_text().splitlines()]
    assert sorted((Path(line["shard"]).name, line["key"]) for line in lines) == [
        ("broken.tar", None),
        ("shard-000000.tar", "k"),
    ]
    (foreign / "broken.tar").unlink()
    before = {path: path.stat().st_mtime_ns for path in foreign.glob("*.index")}
    assert index(foreign) == 0 and "6 shards, 6 indexed before" in read()
    next(iter(before)).unlink()
    assert index(foreign) == 0 and "6 shards, 5 indexed before" in read()
    assert sum(path.stat().st_mtime_ns != time for path, time in before.items()) == 1
    theirs = [read_index(shard.index).entries for shard in open_folder(foreign, tokenizer())][:5]
    assert theirs == [read_index(shard.index).entries for shard in open_folder(folder / "captions", tokenizer())]


def test_remote_tars_are_indexed_into_a_folder(folder: Path, tmp_path: Path, read: Read) -> None:
    ranges = f"file://{folder}/captions/shard-00000{{0..4}}.tar"
    assert index(ranges, "--out", tmp_path / "out") == 0
    shards = open_folder(tmp_path / "out", tokenizer())
    assert [shard.path for shard in shards] == [f"file://{folder}/captions/shard-00000{n}.tar" for n in range(5)]
    assert index(ranges, f"pipe:cat {folder}/text/shard-000000.tar", "--out", tmp_path / "out") == 0
    assert "6 shards, 5 indexed before" in read()


def test_wrong_arguments_are_one_sentence(folder: Path, tmp_path: Path, read: Read) -> None:
    for arguments, words in [
        (["s3://b/x.tar"], "error: shard s3://b/x.tar: --out is missing; name a folder for the indexes"),
        ([tmp_path / "gone.tar"], "gone.tar: no such file; correct the path"),
        ([folder / "text", "--out", tmp_path], "the index of a local tar lies beside it; leave --out away"),
        ([folder / "text", "--processes", 0], "--processes 0: must be at least 1"),
    ]:
        assert index(*arguments) == 2
        assert words in read()


def test_a_look_into_shards(foreign: Path, read: Read) -> None:
    (foreign / "broken.tar").unlink()
    assert inspect_shards.main([str(foreign)]) == 2
    assert f"no indexes in it; run `python -m tools.index_shards {foreign}`" in read()
    index(foreign)
    read()
    tar = foreign / "good-shard-000000.tar"
    entry = read_index(tar.with_suffix(".index")).entries[1]
    member = next(member for member in entry.members if member.suffix == "jpg")
    with tar.open("r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    assert inspect_shards.main([str(foreign), "--samples", "6", "--lint"]) == 1
    printed = read()
    assert "2 samples cannot be used" in printed and "caption" in printed
    bad = [json.loads(line) for line in (foreign / "inspect" / "lint.jsonl").read_text().splitlines()]
    assert {line["key"] for line in bad} == {entry.key, "k"}
    for name in ("histograms.png", "samples.png"):
        with Image.open(foreign / "inspect" / name) as image:
            assert image.size[0] >= 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_the_plan_of_a_recipe_is_what_the_loader_serves(folder: Path, tmp_path: Path, read: Read) -> None:
    made = make(folder, {"steps": 30}, lanes=4)
    (tmp_path / "recipe.yaml").write_text(dump(made))
    arguments = [str(tmp_path / "recipe.yaml"), "--packs", "200", "--ranks", "2", "--json", str(tmp_path / "plan.json")]
    assert plan_data.main(arguments) == 0
    printed = read()
    found = json.loads((tmp_path / "plan.json").read_text())
    tokens = images = 0
    with Loader(made, tokenizer(), 0, 1) as loader:
        for _, step in zip(range(25), loader, strict=False):
            tokens += step.valid_tokens["decoder"]
            images += step.valid_tokens["connector"] / made.model.connector.num_tokens
            served = step.served
    assert found["packs"] == 200 and found["tokens"] == tokens == sum(served.values())
    assert found["mixture"] == {name: count / tokens for name, count in served.items()}
    assert found["padding"] == pytest.approx(1 - tokens / 200 / made.data.sequence_length)
    assert found["images_per_pack"] == pytest.approx(images / 200)
    assert 0.5 < found["balance"] <= 1 and 0 < found["longest_wait"] <= made.data.max_wait
    assert "balance of 2 ranks" in printed and "wanted 60.00%" in printed and "after all 30 steps" in printed
    assert "full of images" in printed and found["shorter_than_a_pack_but_cut"] == 0 and "off" not in found
    assert plan_data.main([*arguments, "--packs", "1200"]) == 0
    found, printed = json.loads((tmp_path / "plan.json").read_text()), read()
    assert 0 < found["off"] <= found["off_at_most"] and "off the weights" in printed and "proved: " in printed
    assert plan_data.main([*arguments[:1], "--ranks", "3"]) == 2
    assert "--ranks 3 does not divide the 4 lanes; numbers that fit: [1, 2, 4]" in read()


def test_the_plan_tells_what_too_few_images_cost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(folder, sequence_length=64, max_images=1, sources={"two": Source("", 1.0), "one": Source("", 1.0)})
    rows = {"two": [[plans.IMAGE, plans.text(5)] * 2] * 9, "one": [[plans.IMAGE, plans.text(5)]] * 9}
    shards = {name: plans.source(name, of_source) for name, of_source in rows.items()}
    monkeypatch.setattr(plan_data, "read_index", plans.read)
    planner = Planner(shards, recipe.data, 0, plans.SIZER, {"two": 1.0, "one": 1.0}, read=plans.read)
    found = plan_data.measure(recipe, planner, 8, 1)
    cut = found["shorter_than_a_pack_but_cut"]
    assert cut > 0 and found["cut"] in (2 * cut, 2 * cut - 1)
    assert found["packs_without_room_for_an_image"] == 1 and found["padding"] == pytest.approx(55 / 64)
