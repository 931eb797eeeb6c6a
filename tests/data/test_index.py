import dataclasses
import hashlib
import io
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from mmtrain.config.errors import DataError
from mmtrain.data.columns import COLUMNS
from mmtrain.data.documents import BadSample
from mmtrain.data.index import build_index, index_path, open_folder, read_index, write_index
from mmtrain.data.record import ImagePart, Text
from mmtrain.data.shards import read_members
from tests.data.inputs import decode_document, picture, tokenizer, write_tar

TURNS = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "red"}]
GOOD = [
    ("cap", {"jpg": picture(31, 17, "JPEG"), "txt": b"A red bar."}),
    (
        "talk",
        {"json": json.dumps({"kind": "conversation", "turns": TURNS, "images": ["png"]}).encode(), "png": picture()},
    ),
    ("text", {"json": json.dumps({"kind": "text", "texts": ["Once upon"], "images": [None]}).encode()}),
]


def indexed(folder: Path, samples: list = GOOD, per_shard: int = 100) -> Path:
    for tar in write_tar(folder, samples, per_shard):
        write_index(build_index(tar, tokenizer())[0])
    return folder


def test_every_entry_is_what_the_loader_decodes(tmp_path: Path) -> None:
    (shard,) = open_folder(indexed(tmp_path), tokenizer())
    index = read_index(shard.index)
    assert [entry.key for entry in index.entries] == ["cap", "talk", "text"]
    for entry, (_, files) in zip(index.entries, GOOD, strict=True):
        read = read_members(index.path, entry)
        assert read == files
        document = decode_document(entry, read, tokenizer(), index.path)
        assert len(document.parts) == len(entry.segments)
        for part, segment in zip(document.parts, entry.segments, strict=True):
            if isinstance(part, Text):
                assert (len(part.token_ids), part.supervised.sum()) == (segment.tokens, segment.supervised)
            else:
                assert isinstance(part, ImagePart) and segment.is_image and segment.width > 0
    assert index.entries[0].segments[0][3:] == (31, 17)


def test_the_header_counts_what_the_entries_hold(tmp_path: Path) -> None:
    (shard,) = open_folder(indexed(tmp_path, [*GOOD, ("bad", {"txt": b"alone"})]), tokenizer())
    entries, header = read_index(shard.index).entries, shard.header
    assert (header.samples, header.unusable) == (4, 1)
    assert header.tokens == sum(segment.tokens for entry in entries for segment in entry.segments)
    assert header.supervised == sum(segment.supervised for entry in entries for segment in entry.segments)
    assert header.images == sum(segment.is_image for entry in entries for segment in entry.segments) == 2
    assert (
        entries[3].unusable == "0 images in a sample without a canonical JSON, expected 1" and not entries[3].segments
    )


def test_writing_and_reading_keeps_everything(tmp_path: Path) -> None:
    built, damage = build_index(write_tar(tmp_path, [*GOOD, ("bad", {"txt": b"alone"})])[0], tokenizer())
    path = write_index(built)
    assert damage == "" and list(tmp_path.glob("*.partial")) == []
    first = path.read_bytes()
    (shard,) = open_folder(tmp_path, tokenizer())
    assert read_index(shard.index) == built
    assert write_index(built).read_bytes() == first


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture at all", "member jpg: not an image (no known header)"),
        (picture(form="GIF"), "member jpg: image format GIF, expected JPEG, PNG or WebP"),
        (picture()[:20], "member jpg: "),
    ],
)
def test_unusable_images_are_recorded(tmp_path: Path, data: bytes, reason: str) -> None:
    index, _ = build_index(write_tar(tmp_path, [("k", {"jpg": data, "txt": b"x"}), GOOD[0]])[0], tokenizer())
    assert index.entries[0].unusable.startswith(reason) and not index.entries[1].unusable


def test_a_decompression_bomb_is_recorded_by_its_header_alone(tmp_path: Path) -> None:
    bomb = bytearray(picture())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    index, _ = build_index(write_tar(tmp_path, [("k", {"png": bytes(bomb), "txt": b"x"})])[0], tokenizer())
    assert index.entries[0].unusable.endswith("pixels (decompression bomb)")


def test_half_a_sample_at_the_end_of_a_truncated_tar_is_recorded(tmp_path: Path) -> None:
    (tar,) = write_tar(tmp_path, [GOOD[0], ("half", {"jpg": picture(200, 200, "JPEG"), "txt": b"A bar."})])
    whole, _ = build_index(tar, tokenizer())
    tar.write_bytes(tar.read_bytes()[: whole.entries[1].members[0].offset + 100])
    index, damage = build_index(tar, tokenizer())
    assert [entry.unusable for entry in index.entries] == ["", damage]
    assert damage == f"the tar ends early, at byte {tar.stat().st_size}"
    assert index.entries[0] == whole.entries[0]
    write_index(index)
    assert read_index(open_folder(tmp_path, tokenizer())[0].index) == index
    with pytest.raises(BadSample, match="the tar ends early"):
        decode_document(index.entries[1], {}, tokenizer(), "s.tar")


def test_members_of_one_name_are_recorded_and_repeated_keys_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "a.txt"):
            tar.addfile(tarfile.TarInfo(name))
    assert build_index(path, tokenizer())[0].entries[0].unusable == "1 of its members have the name of another"
    write_tar(tmp_path, [GOOD[0], GOOD[1], GOOD[0]])
    with pytest.raises(DataError, match=r"000000.tar, key 'cap': comes twice, or its members are not neighbours; pack"):
        build_index(tmp_path / "shard-000000.tar", tokenizer())


def test_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data folder .*none: no such folder; correct the path, or make it with `python"
    ):
        open_folder(tmp_path / "none", tokenizer())
    with pytest.raises(
        DataError, match=r"data folder .*: no .tar shards in it; make some with `python -m tools.make_sh"
    ):
        open_folder(tmp_path, tokenizer())
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="only compressed tars, which no byte range can be read of; unpack them"):
        open_folder(tmp_path, tokenizer())


def test_a_folder_without_a_usable_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 shards without a single usable sample; make them again"):
        open_folder(indexed(tmp_path, [("k", {"txt": b"alone"})]), tokenizer())


def test_an_index_of_another_tokenizer_is_refused_with_both_hashes(tmp_path: Path) -> None:
    indexed(tmp_path)
    hashes = f"indexed for tokenizer {tokenizer().hash[:16]}, the recipe's is {tokenizer('chatml').hash[:16]} "
    with pytest.raises(DataError, match=hashes + r".*correct data.tokenizer or data.chat_template, or run `python -m"):
        open_folder(tmp_path, tokenizer("chatml"))


def test_indexes_that_are_missing_or_stale(tmp_path: Path) -> None:
    remedy = f"run `python -m tools.make_shards wds {tmp_path} --tokenizer F --chat-template T`"
    tars = write_tar(
        indexed(tmp_path), [(f"k{number}", GOOD[0][1]) for number in range(20)]
    )  # written anew under its old index
    size = tars[0].stat().st_size
    with pytest.raises(DataError, match=rf"000000.tar: {size} bytes, but \d+ when indexed; {remedy}"):
        open_folder(tmp_path, tokenizer())
    index_path(tars[0]).unlink()
    with pytest.raises(DataError, match=rf"000000.tar: no index beside it \(shard-000000.index\); {remedy}"):
        open_folder(tmp_path, tokenizer())


def spoilt(path: Path, line: dict | bytes | None = None, payload: bytes | None = None) -> Path:
    """An index with other header fields (or another first line) or other columns; its hash made to fit the columns."""
    first, _, columns = path.read_bytes().partition(b"\n")
    columns = columns if payload is None else payload
    if not isinstance(line, bytes):
        fields = {**json.loads(first), "payload_sha256": hashlib.sha256(columns).hexdigest(), **(line or {})}
        line = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
    path.write_bytes(line + b"\n" + columns)
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "broken first line"),
        (b'{"version": 2}', "broken first line"),
        (b"[" * 100_000, "broken first line"),
        ({"samples": None}, "broken first line"),
        ({"samples": "3"}, "broken first line"),
        ({"lengths": [1]}, "broken first line"),
        ({"payload_sha256": "0"}, r"its \d+ bytes of columns are not those that were written"),
        ({"lengths": {"key": 1}}, "broken columns"),
        ({"samples": 4}, "3 samples that are not the 4 of its first line"),
    ],
)
def test_broken_index_files(tmp_path: Path, line: dict | bytes, message: str) -> None:
    path = spoilt(index_path(next(indexed(tmp_path).glob("*.tar"))), line)
    with pytest.raises(DataError, match=rf"index {path}: {message}.*; run `python -m tools.make_shards wds"):
        read_index(path)


def test_columns_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    """Also where whoever spoilt them made the hash fit."""
    path = index_path(next(indexed(tmp_path).glob("*.tar")))
    good = path.read_bytes()
    first, _, payload = good.partition(b"\n")
    lengths = json.loads(first)["lengths"]
    at = 0
    for name, kind in COLUMNS.items():
        width = np.dtype(kind).itemsize
        for value in (b"\xff", b"\x7f"):
            if lengths[name] and not (name in ("key", "reason", "suffix") or (width > 1 and value == b"\x7f")):
                spoilt(path, payload=payload[:at] + value * width + payload[at + width :])
                with pytest.raises(DataError, match="broken columns"):
                    read_index(path)
                path.write_bytes(good)
        at += width * lengths[name]
    spoilt(path, payload=payload[:-4])
    with pytest.raises(DataError, match="broken columns"):
        read_index(path)


def test_an_index_whose_tar_is_gone(tmp_path: Path) -> None:
    next(indexed(tmp_path).glob("*.tar")).unlink()
    with pytest.raises(DataError, match=r"index .*000000.index: its tar shard-000000.tar is gone; restore it, or del"):
        open_folder(tmp_path, tokenizer())


def test_names_that_are_no_utf8_and_odd_reasons_survive(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    lone = b'{"kind": "text", "texts": [null], "images": ["\\ud800"]}'
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, body in (("a\udcff\n.txt", b"x"), ("b.json", lone)):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    built, _ = build_index(path, tokenizer())
    found = read_index(write_index(built))
    assert found == built and [entry.key for entry in found.entries] == ["a\udcff\n", "b"]
    assert found.entries[1].unusable == "member \\ud800 is missing"
    assert [found.columns.find(entry.key) for entry in found.entries] == [0, 1]
    assert found.columns.find("c") is None


def test_an_index_of_another_format_is_refused(tmp_path: Path) -> None:
    tar = next(indexed(tmp_path).glob("*.tar"))
    built, _ = build_index(tar, tokenizer())
    write_index(dataclasses.replace(built, header=dataclasses.replace(built.header, version=99)))
    with pytest.raises(DataError, match="format 99, this code reads 2; run `python"):
        open_folder(tmp_path, tokenizer())


def test_opening_reads_no_entry(tmp_path: Path) -> None:
    path = index_path(next(indexed(tmp_path).glob("*.tar")))
    with path.open("r+b") as file:
        file.readline()
        os.ftruncate(file.fileno(), file.tell())
    assert open_folder(tmp_path, tokenizer())[0].header.samples == 3
