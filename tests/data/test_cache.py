import errno
import multiprocessing
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import fsspec
import pytest

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.schema import Source
from mmtrain.data import cache
from mmtrain.data.cache import ShardCache
from mmtrain.data.columns import Index
from mmtrain.data.index import build_index, open_folder, read_index, write_index
from tests.data.inputs import tokenizer
from tests.data.streams import make, packs, steps

NO_LIMIT = 1 << 40


def shard(folder: Path, name: str, size: int = 1000) -> str:
    """A file behind an address."""
    path = folder / name
    path.write_bytes(name.encode().ljust(size, b"."))
    return f"file://{path}"


def held(folder: Path) -> list[bytes]:
    """First byte of each copy, the one used longest ago first."""
    found = []
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):  # it may go meanwhile
            found.append((path.stat().st_mtime_ns, path.read_bytes()[:1]))
    return [first for _, first in sorted(found)]


def test_a_shard_is_fetched_once_and_the_oldest_copy_goes(tmp_path: Path) -> None:
    store = ShardCache(tmp_path / "copies", 2500)
    addresses = {name: shard(tmp_path, name) for name in "abc"}
    assert store.local(addresses["a"], 1000).read_bytes() == b"a".ljust(1000, b".")
    store.local(addresses["b"], 1000)
    (tmp_path / "a").unlink()
    store.local(addresses["a"], 1000)  # not asked for again, and now the one used last
    store.local(addresses["c"], 1000)
    assert held(tmp_path / "copies") == [b"a", b"c"]
    assert not list((tmp_path / "copies").glob("*.partial"))


def test_an_address_of_unknown_size_is_fetched_within_the_limit(tmp_path: Path) -> None:
    store = ShardCache(tmp_path / "copies", 1500)
    store.local(shard(tmp_path, "a"))
    store.local(shard(tmp_path, "b"))
    assert held(tmp_path / "copies") == [b"b"]


@pytest.mark.parametrize(
    ("address", "size", "limit", "words"),
    [
        ("file:///nowhere/x.tar", 10, NO_LIMIT, r"cannot be fetched \(.*No such file.*\), tried 3 times; check the"),
        ("pipe:printf abc; exit 3", 3, NO_LIMIT, "cannot be fetched .* tried 3 times"),
        ("pipe:printf abc", 5, NO_LIMIT, "3 bytes came, but 5 when indexed; it changed, index it again"),
        ("pipe:cat /dev/zero", 5, NO_LIMIT, r"\d+ bytes came, but 5 when indexed"),
        ("pipe:printf abc", 3, 2, "3 bytes, more than the whole cache of 2; raise data.cache_gib"),
        ("nosuch://host/x.tar", 3, NO_LIMIT, "install what fsspec needs for it"),
    ],
)
def test_what_cannot_be_fetched(
    address: str, size: int, limit: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=words) as caught:
        ShardCache(tmp_path / "copies", limit).local(address, size)
    assert str(caught.value).startswith(f"shard {address}: ")
    assert not list((tmp_path / "copies").glob("*.tar*"))


def test_a_full_disk_costs_the_other_copies_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardCache(tmp_path / "copies", NO_LIMIT)
    old, new = store.local(shard(tmp_path, "a")), shard(tmp_path, "b")
    opened = cache._open

    def full(address: str) -> BinaryIO:
        if old.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(address)

    monkeypatch.setattr(cache, "_open", full)
    monkeypatch.setattr(cache.time, "sleep", lambda _: None)
    assert store.local(new, 1000).exists() and not old.exists()

    def always(address: str) -> BinaryIO:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_open", always)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"no space left for its copy in .*; free some, lower data.cache_gib, or set"):
        ShardCache(tmp_path / "other", NO_LIMIT).local(new, 1000)


def _want(folder: str, address: str, size: int, answers: "multiprocessing.SimpleQueue[int]") -> None:
    answers.put(len(ShardCache(Path(folder), NO_LIMIT).local(address, size).read_bytes()))


def test_two_processes_fetch_a_shard_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    address = f"pipe:echo x >> {log}; sleep 0.5; printf abc"
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    both = [context.Process(target=_want, args=(str(tmp_path / "copies"), address, 3, answers)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [answers.get(), answers.get()] == [3, 3] and log.read_text() == "x\n"


def test_what_a_killed_process_left_is_no_copy_and_goes(tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    address = shard(tmp_path, "a")
    (copies / "0123.tar.partial").write_bytes(b"h" * 900)
    os.utime(copies / "0123.tar.partial", (1, 1))
    assert ShardCache(copies, 1500).local(address, 1000).stat().st_size == 1000
    assert not (copies / "0123.tar.partial").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_the_same_stream(folder: Path, remote: tuple[Path, str], workers: int) -> None:
    where, address = remote
    (first, *_) = open_folder(where / "captions", tokenizer())
    assert first.path == f"{address}/captions/shard-000000.tar"
    expected = steps(make(folder, {"steps": 3}))
    largest = max(tar.stat().st_size for tar in folder.rglob("*.tar"))
    room = 2.5 * largest / 2**30  # so that copies are removed and fetched again
    found = steps(make(where, {"steps": 3}, workers=workers, cache=str(where / "copies"), cache_gib=room))
    assert [packs(step) for step in found] == [packs(step) for step in expected]
    assert 1 <= len(list((where / "copies").glob("*.tar"))) <= 4


def test_shards_of_an_object_store_come_through_fsspec(folder: Path, tmp_path: Path) -> None:
    """fsspec's store in memory stands for s3 and its like: whatever webdataset has no opener for."""
    store = fsspec.filesystem("memory")
    (tmp_path / "text").mkdir()
    for tar in (folder / "text").glob("*.tar"):
        address = f"memory://bucket/{tar.name}"
        store.pipe(address, tar.read_bytes())
        write_index(build_index(tar, tokenizer(), address)[0], tmp_path / "text" / f"{tar.stem}.index")
    made, local = (
        make(folder, {"steps": 2}, sources={"text": Source(str(where / "text"))}, cache=str(tmp_path / "copies"))
        for where in (tmp_path, folder)
    )
    assert [packs(step) for step in steps(made)] == [packs(step) for step in steps(local)]
    assert list((tmp_path / "copies").glob("*.tar"))
    store.rm("bucket", recursive=True)


def test_indexes_may_name_commands_only_if_the_recipe_trusts_them(folder: Path, tmp_path: Path) -> None:
    sources = {"text": Source(str(tmp_path / "text"))}
    (tmp_path / "text").mkdir()
    for tar in (folder / "text").glob("*.tar"):
        index: Index = build_index(tar, tokenizer(), f"pipe:cat {tar}")[0]
        assert read_index(write_index(index, tmp_path / "text" / f"{tar.stem}.index")) == index
    made = make(folder, {"steps": 1}, sources=sources, cache=str(tmp_path / "copies"))
    with pytest.raises(ConfigError, match=r"data.sources.text: index .* would run 'pipe:cat .*; set data.allow_p"):
        steps(made)
    trusted = replace(made, data=replace(made.data, allow_pipes=True))
    local = replace(made, data=replace(made.data, sources={"text": Source(str(folder / "text"))}))
    assert [packs(step) for step in steps(trusted)] == [packs(step) for step in steps(local)]
