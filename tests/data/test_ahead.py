import errno
import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.data import cache
from mmtrain.data.ahead import Fetcher
from mmtrain.data.cache import ShardCache, _locked
from mmtrain.data.index import Shard, open_folder
from mmtrain.data.loader import Loader
from mmtrain.data.record import IndexHeader
from tests.data.inputs import tokenizer
from tests.data.streams import make
from tests.data.test_cache import held, shard

NO_LIMIT = 1 << 40


def shards(folder: Path, names: str) -> list[Shard]:
    """Remote shards of 1,000 bytes."""
    return [
        Shard(shard(folder, name), IndexHeader(2, "", "", 1000, "", 1, 0, 0, 0, 0), f"{name}.index") for name in names
    ]


def wait(ready: Callable[[], bool]) -> None:
    """Until something in another thread has happened."""
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(thread, address) of every download, in the order in which they began; each takes a while."""
    log: list[tuple[str, str]] = []
    opened = cache._open

    def slow(address: str) -> object:
        log.append((threading.current_thread().name, address))
        time.sleep(0.01)
        return opened(address)

    monkeypatch.setattr(cache, "_open", slow)
    return log


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[ShardCache, Fetcher, Path]]:
    """A cache with room for two shards and a half."""
    made = ShardCache(tmp_path / "copies", 2500)
    fetcher = Fetcher(made, 2500)
    yield made, fetcher, tmp_path
    fetcher.close()


def test_a_run_waits_for_no_shard_but_its_first(folder: Path, remote: tuple[Path, str], fetched: list) -> None:
    """Blocks of one shard, packs that need less than a block: each is there before its turn."""
    where, _ = remote
    made = make(where, {"steps": 30}, cache=str(where / "copies"), global_batch=1, window=6, open_shards=1)
    with Loader(made, tokenizer(), 0, 1) as loader:
        addresses = {shard.path: shard for name in made.data.sources for shard in _opened(where, name)}
        first = {shard.path for shard in chain(*loader._planner.shards())}
        store = loader._spec.open_cache()
        needed: list[str] = []

        def ready() -> bool:
            return all(store.held(path, addresses[path].header.shard_bytes) for path in needed)

        for _ in loader:
            needed += [shard.path for shard in chain(*loader._planner.shards()) if shard.path not in needed]
            wait(ready)
    assert len(needed) == len(addresses) == 9
    assert sorted(address for _, address in fetched) == sorted(needed)  # each once
    ahead = [address for thread, address in fetched if thread == "fetch"]
    assert {address for _, address in fetched} - set(ahead) <= first
    for name in ("captions", "text"):  # and in the order of the plan
        assert [path for path in ahead if name in path] == [path for path in needed if name in path and path in ahead]


def _opened(where: Path, name: str) -> list[Shard]:
    return open_folder(where / name, tokenizer()) if (where / name).is_dir() else []


def test_no_more_is_fetched_than_fits_and_nothing_that_is_wanted_goes(store: tuple, fetched: list) -> None:
    made, fetcher, folder = store
    a, b, c, d = shards(folder, "abcd")
    made.local(a.path, 1000)
    made.local(b.path, 1000)
    fetcher.want([c], [a, d])
    wait(lambda: held(folder / "copies") == [b"a", b"c"])  # b went, although it was used after a
    fetcher.want([c, a, b], [])  # do not fit: nothing to be done
    fetcher.want([d], [c, a])
    wait(lambda: sorted(held(folder / "copies")) == [b"c", b"d"])
    fetcher.close()
    assert [address for thread, address in fetched if thread == "fetch"] == [c.path, d.path]


def test_what_another_process_fetches_is_left_to_it(store: tuple, fetched: list) -> None:
    made, fetcher, folder = store
    a, b = shards(folder, "ab")
    copy = made._copy(a.path)
    copy.parent.mkdir()
    with _locked(copy.with_suffix(".lock")):
        fetcher.want([a, b], [])
        wait(lambda: held(folder / "copies") == [b"b"])
        fetcher.close()
    assert fetched == [("fetch", b.path)]


def test_two_fetchers_share_the_work(tmp_path: Path, fetched: list) -> None:
    wanted = shards(tmp_path, "abcdef")
    fetchers = [Fetcher(ShardCache(tmp_path / "copies", NO_LIMIT), NO_LIMIT) for _ in range(2)]
    for fetcher in fetchers:
        fetcher.want(wanted[:2], wanted[2:])
    wait(lambda: len(held(tmp_path / "copies")) == 6)
    for fetcher in fetchers:
        fetcher.close()
    assert sorted(address for _, address in fetched) == sorted(shard.path for shard in wanted)


def test_many_fetchers_together_keep_the_bound(tmp_path: Path, fetched: list) -> None:
    wanted = shards(tmp_path, "abcdef")
    made = ShardCache(tmp_path / "copies", 2500)
    together = threading.Barrier(len(wanted))

    def fetch(shard: Shard) -> None:
        together.wait()
        made.ahead(shard.path, 1000, lambda: True)

    threads = [threading.Thread(target=fetch, args=(shard,)) for shard in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 6 and 1 <= len(held(tmp_path / "copies")) <= 2


def test_an_evaluation_fetches_nothing_ahead(folder: Path, remote: tuple[Path, str], fetched: list) -> None:
    where, _ = remote
    made = make(where, cache=str(where / "copies"), open_shards=1)
    with Loader(made, tokenizer(), 0, 1, finite_batches=2) as loader:
        assert len(list(loader)) == 2
    assert fetched and {thread for thread, _ in fetched} == {"MainThread"}


def test_an_error_of_any_kind_ends_no_reading_ahead(store: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fetcher, folder = store
    strange, good = shards(folder, "st")
    opened = cache._open

    def fail(address: str) -> object:
        if address == strange.path:
            raise RuntimeError("of a library")
        return opened(address)

    monkeypatch.setattr(cache, "_open", fail)
    fetcher.want([strange], [good])
    wait(lambda: held(folder / "copies") == [b"t"])


def test_a_full_disk_ends_no_run_and_costs_no_copy(
    store: tuple, fetched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, fetcher, folder = store
    a, b, c = shards(folder, "abc")
    made.local(a.path, 1000)
    usage = shutil.disk_usage(folder)
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=999))
        made.ahead(b.path, 1000, lambda: True)
    assert held(folder / "copies") == [b"a"] and len(fetched) == 1

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardCache, "_download", full)
        fetcher.want([a, b], [])
        wait(lambda: b.path in fetcher._failed)
    fetcher.want([a, b], [c])  # b is left to who needs it
    fetcher.want([a], [c])
    wait(lambda: held(folder / "copies")[-1:] == [b"c"])
    assert made.local(b.path, 1000).exists()


def test_what_cannot_be_fetched_is_said_to_who_needs_it(store: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    made, fetcher, folder = store
    gone, there = shards(folder, "xy")
    (folder / "x").unlink()
    fetcher.want([gone], [there])
    wait(lambda: held(folder / "copies") == [b"y"])
    monkeypatch.setattr(cache.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match="cannot be fetched"):
        made.local(gone.path, 1000)


def test_the_end_drops_a_download(store: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trickle(io.RawIOBase):
        def read(self, _: int = -1) -> bytes:
            time.sleep(0.01)
            return b"x"

    monkeypatch.setattr(cache, "_open", lambda _: Trickle())
    _, fetcher, folder = store
    fetcher.want([], shards(folder, "a"))
    wait(lambda: list((folder / "copies").glob("*.partial")) != [])
    fetcher.close()
    assert not fetcher._thread.is_alive() and not list((folder / "copies").glob("*.tar*"))
