import errno
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from mmtrain.config.errors import DataError
from mmtrain.data import shards
from mmtrain.data.documents import BadSample
from mmtrain.data.index import build_index, read_index, write_index
from mmtrain.data.record import Member
from mmtrain.data.shards import RawSample, read_members, scan
from tests.data.inputs import tokenizer, write_tar

SAMPLES = [
    ("a", {"json": b'{"x": 1}', "jpg": b"j" * 700}),
    ("b" * 150, {"json": b"{}", "0.png": b"p" * 512, "1.png": b""}),
    ("c", {"json": b"[" + b" " * 3000 + b"]"}),
]


def test_what_is_written_is_read_by_byte_range(tmp_path: Path) -> None:
    (tar,) = write_tar(tmp_path, SAMPLES)
    found = scan(tar)
    assert found.damage == ""
    assert [(sample.key, read_members(tar, sample)) for sample in found.samples] == SAMPLES
    size = tar.stat().st_size
    ends = [sample.offset + sample.size for sample in found.samples]
    assert [sample.offset for sample in found.samples] == [0, *ends[:-1]] and ends[-1] <= size


def test_webdataset_reads_our_tars(tmp_path: Path) -> None:
    (tar,) = write_tar(tmp_path, SAMPLES)
    with tar.open("rb") as stream:
        files = ({"__url__": ""} | file for file in webdataset.tariterators.tar_file_iterator(stream))
        groups = list(webdataset.tariterators.group_by_keys(files))
    ours = [(group["__key__"], {k: v for k, v in group.items() if not k.startswith("__")}) for group in groups]
    assert ours == SAMPLES


def test_we_read_the_tars_of_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "theirs.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in SAMPLES:
            writer.write({"__key__": f"folder/{key}"} | members)
    samples = scan(path).samples
    assert [(sample.key, read_members(path, sample)) for sample in samples] == [(f"folder/{k}", m) for k, m in SAMPLES]


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first = [tar.read_bytes() for tar in write_tar(tmp_path / "a", SAMPLES, per_shard=2)]
    assert first == [tar.read_bytes() for tar in write_tar(tmp_path / "b", SAMPLES, per_shard=2)]
    assert len(first) == 2
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("/etc/x.json", tarfile.REGTYPE, "an absolute path"),
        ("a/../../x.json", tarfile.REGTYPE, "'..' in its path"),
        ("x.json", tarfile.SYMTYPE, "a link \\(to '/etc/passwd'\\)"),
        ("x.json", tarfile.LNKTYPE, "a link"),
        ("x.json", tarfile.CHRTYPE, "a device or another special file"),
        ("x.json", tarfile.GNUTYPE_SPARSE, "a sparse file"),
        ("x.json", tarfile.FIFOTYPE, "a device or another special file"),
    ],
)
def test_dangerous_members_are_refused(tmp_path: Path, name: str, kind: bytes, why: str) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(DataError, match=f"evil.tar, member '{name}': {why}.* has no place in a shard; pack the folder"):
        scan(path)


def test_directories_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "folder.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("sub")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("sub/k.txt"))
    assert [sample.key for sample in scan(path).samples] == ["sub/k"]


@pytest.mark.parametrize("cut", range(512, 512 * 9, 300))
def test_a_truncated_tar_loses_only_the_sample_it_ends_in(tmp_path: Path, cut: int) -> None:
    (tar,) = write_tar(tmp_path, [("a", {"x": b"1" * 600}), ("b", {"x": b"2" * 600}), ("c", {"x": b"3" * 600})])
    whole = {sample.key: read_members(tar, sample) for sample in scan(tar).samples}
    tar.write_bytes(tar.read_bytes()[:cut])
    found = scan(tar)
    good = [sample for sample in found.samples if not sample.damage]
    assert all(read_members(tar, sample) == whole[sample.key] for sample in good)
    complete = [key for number, key in enumerate("abc", start=1) if cut >= 1536 * number]
    assert [sample.key for sample in good] == complete
    assert found.damage


def test_a_garbled_header_is_reported_with_its_place(tmp_path: Path) -> None:
    (tar,) = write_tar(tmp_path, [("a", {"x": b"1"}), ("b", {"x": b"2"})])
    content = bytearray(tar.read_bytes())
    content[1024:1100] = b"\xff" * 76
    tar.write_bytes(content)
    found = scan(tar)
    assert [sample.key for sample in found.samples] == ["a"]
    assert found.damage == "garbled header at byte 1024, what follows it is lost"


def test_a_shard_that_shrank_or_went_since_it_was_listed(tmp_path: Path) -> None:
    (tar,) = write_tar(tmp_path, SAMPLES)
    last = scan(tar).samples[-1]
    tar.write_bytes(tar.read_bytes()[: last.offset + 600])
    with pytest.raises(BadSample, match="the shard ends early: 600 of 3584 bytes"):
        read_members(tar, last)
    tar.unlink()
    with pytest.raises(DataError, match=r"000000.tar: no such file, though its index lists it; restore it or index"):
        read_members(tar, last)


def test_a_shard_written_anew_under_an_old_listing(tmp_path: Path) -> None:
    (tar,) = write_tar(tmp_path, SAMPLES)
    old = scan(tar).samples
    write_tar(tmp_path, [SAMPLES[2], SAMPLES[1], SAMPLES[0]])
    for sample in (old[0], old[2]):
        with pytest.raises(
            DataError, match=f"sample {sample.key}: not at byte {sample.offset} any more, the shard changed"
        ):
            read_members(tar, sample)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "photo.tar"
    path.write_bytes(b"\x1f\x8b" + b"z" * 2000)
    with pytest.raises(DataError, match=r"photo.tar: not a readable tar \(.*\); unpack compressed tars first"):
        scan(path)


def test_a_disk_that_fails_is_nobodys_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shards.time, "sleep", waited.append)
    monkeypatch.setattr(os, "open", stale)
    entry = RawSample("a", 0, 512, (Member("txt", 512, 1),))
    with pytest.raises(DataError, match=r"shard x.tar: cannot be read \(Stale file handle\); mend that, then run"):
        read_members("x.tar", entry)
    assert waited == [1, 4]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_that_passes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write_tar(tmp_path, [("a", {"txt": b"one"})], 1)
    (tar,) = tmp_path.glob("*.tar")
    write_index(build_index(tar, tokenizer())[0])
    waited: list[float] = []
    monkeypatch.setattr(shards.time, "sleep", waited.append)
    for module, name, read in (
        (os, "pread", lambda: read_members(tar, scan(tar).samples[0]) == {"txt": b"one"}),
        (Path, "open", lambda: len(read_index(tar.with_suffix(".index")).columns) == 1),
    ):
        left, works = [number, number], getattr(module, name)

        def failing(*rest: object, left: list[int] = left, works: Callable = works) -> object:
            if left:
                raise OSError(code := left.pop(), os.strerror(code))
            return works(*rest)

        monkeypatch.setattr(module, name, failing)
        assert read() and not left
    assert waited == [1, 4, 1, 4]
