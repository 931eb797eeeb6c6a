import os
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Source
from mmtrain.config.tokens import TokenKind
from mmtrain.data import reader
from mmtrain.data.index import open_folder, read_index
from mmtrain.data.loader import Loader
from tests.data.inputs import picture, tokenizer, write_tar
from tests.data.streams import caption, index, make, packs, steps


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """The same shards with one image garbled after indexing, and one sample cut off by the end of the tar."""
    for name in ("captions", "text"):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for shard in open_folder(tmp_path / "captions", tokenizer()):
        for entry in read_index(shard.index).entries:
            member = next(member for member in entry.members if member.suffix == "jpg")
            if entry.key == "c7":
                with Path(shard.path).open("r+b") as file:
                    file.seek(member.offset)
                    file.write(b"\0" * member.size)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_keeps_its_place_as_padding(folder: Path, broken: Path, workers: int) -> None:
    good = steps(make(folder))
    found = steps(make(broken, workers=workers, max_bad_fraction=0.5))
    lines = [line for step in found for line in step.ledger]
    assert {line["key"] for line in lines} == {"c7"} and {line["source"] for line in lines} == {"captions"}
    assert all("unreadable image" in line["reason"] and line["shard"].endswith(".tar") for line in lines)
    seen = 0
    for step, twin in zip(found, good, strict=True):
        assert step.pack_keys == twin.pack_keys and step.cursor == twin.cursor
        for pack, whole in zip(packs(step), packs(twin), strict=True):
            bad = pack["keys"].index("c7") if "c7" in pack["keys"] else None
            place = [bad is not None and n == bad for n in whole["document_ids"]]
            seen += bad is not None
            for name, empty in [("tokens", tokenizer().pad_id), ("weights", 0), ("document_ids", -1), ("kind", 0)]:
                expected = [empty if hit else value for hit, value in zip(place, whole[name], strict=True)]
                assert pack[name] == expected
            assert len(pack["images"]) == len(whole["images"]) - (bad is not None)
    assert seen == len(lines) > 0


def test_a_truncated_member_is_a_bad_sample(broken: Path) -> None:
    shard = open_folder(broken / "text", tokenizer())[-1]
    entries = read_index(shard.index).entries
    recipe = make(broken, sources={"text": Source(str(broken / "text"))}, max_bad_fraction=1.0)
    with Loader(recipe, tokenizer(), 0, 1) as loader:
        os.truncate(shard.path, entries[-1].offset + 600)
        lines = {(line["key"], line["reason"]) for step in loader for line in step.ledger}
    assert {key for key, _ in lines} == {entries[-1].key}
    assert all("the shard ends early" in reason for _, reason in lines)


def test_samples_that_the_index_calls_unusable_are_in_the_ledger_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "captions", [caption(n, b"no image" if n in (3, 8) else None) for n in range(20)], 7)
    index(tmp_path / "captions")
    sources = {"captions": Source(str(tmp_path / "captions"))}
    made = make(tmp_path, {"steps": 0, "epochs": 1.0}, sources=sources)
    ledgers = [[line for step in steps(made, rank, 2) for line in step.ledger] for rank in range(2)]
    assert sorted(line["key"] for ledger in ledgers for line in ledger) == ["c3", "c8"]


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_packs_are_padding_and_move_nothing(folder: Path, workers: int) -> None:
    whole = steps(make(folder))
    found = steps(make(folder, skip_packs=[3, 10, 11], workers=workers, max_bad_fraction=0.0))
    for number, (step, twin) in enumerate(zip(found, whole, strict=True)):
        assert step.cursor == twin.cursor and step.pack_keys == twin.pack_keys and step.served == twin.served
        skipped = {3, 10, 11} & set(range(8 * number, 8 * number + 8))
        for place, (pack, full) in enumerate(zip(packs(step), packs(twin), strict=True), 8 * number):
            if place in skipped:
                assert set(pack["kind"]) == {TokenKind.PADDING} and not any(pack["weights"]) and not pack["images"]
            else:
                assert pack == full
        lines = [(line["key"], line["reason"]) for line in step.ledger]
        expected = [
            (key, f"pack {n} is in data.skip_packs") for n in sorted(skipped) for key in twin.pack_keys[n - 8 * number]
        ]
        assert lines == expected


def test_measuring_never_skips_the_packs_of_training(folder: Path) -> None:
    held_out = {"captions": Source(str(folder / "captions"))}
    found = steps(make(folder, skip_packs=[0, 1]), sources=held_out, finite_batches=2)
    assert [packs(step) for step in found] == [
        packs(step) for step in steps(make(folder), sources=held_out, finite_batches=2)
    ]


def test_bad_samples_are_counted_apart_from_those_that_the_recipe_withholds(tmp_path: Path) -> None:
    write_tar(tmp_path / "captions", [caption(n, b"no image" if n % 4 == 0 else None) for n in range(200)], 50)
    index(tmp_path / "captions")
    source = {"captions": Source(str(tmp_path / "captions"))}
    found = steps(make(tmp_path, sources=source, skip_packs=[1]))
    for step in found:
        assert step.bad == [line for line in step.ledger if "skip_packs" not in line["reason"]]
        assert step.samples == sum(map(len, step.pack_keys)) + len(step.bad)  # what the index refused is in no pack
    assert any(step.bad for step in found) and any(len(step.bad) < len(step.ledger) for step in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_unlike_the_index_stop_the_run(folder: Path, tmp_path: Path, workers: int) -> None:
    """An image that became larger than the canvas has other panels than planned."""
    write_tar(tmp_path / "captions", [caption(n, picture(8, 8).ljust(300, b"\0")) for n in range(30)], 30)
    index(tmp_path / "captions")
    shard = open_folder(tmp_path / "captions", tokenizer())[0]
    entry = next(entry for entry in read_index(shard.index).entries if entry.key == "c4")
    sources = {"captions": Source(str(tmp_path / "captions"))}
    made = make(tmp_path, sources=sources, sub_images=4, workers=workers)
    text_tokens, per_image = entry.tokens, made.model.connector.num_tokens
    with Path(shard.path).open("r+b") as file:
        member = next(member for member in entry.members if member.suffix == "jpg")
        large = picture(64, 64)
        assert len(large) <= member.size
        file.seek(member.offset)
        file.write(large.ljust(member.size, b"\0"))
    with pytest.raises(DataError) as caught:
        steps(made)
    for word in (shard.path, "c4", f"{text_tokens + 5 * per_image} tokens", f"planned {text_tokens + per_image}"):
        assert word in str(caught.value)


def test_samples_larger_than_what_is_read_are_bad(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        entry.key: entry.size
        for name in ("captions", "text")
        for shard in open_folder(folder / name, tokenizer())
        for entry in read_index(shard.index).entries
    }
    limit = max(sizes.values()) - 1
    monkeypatch.setattr(reader, "MAX_SAMPLE_BYTES", limit)
    lines = [line for step in steps(make(folder, max_bad_fraction=1.0)) for line in step.ledger]
    assert {(line["key"], line["reason"]) for line in lines} <= {
        (key, f"{size} bytes, more than the {limit} that are read") for key, size in sizes.items() if size > limit
    }
    assert lines


def test_a_pack_read_in_several_parts_is_the_same_pack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [packs(step) for step in steps(make(folder, {"steps": 2}))]
    monkeypatch.setattr(reader, "READ_BYTES", 4000)  # two or three samples
    assert [packs(step) for step in steps(make(folder, {"steps": 2}))] == expected
