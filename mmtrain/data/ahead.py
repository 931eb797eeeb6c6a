"""Remote shards fetched into the node's cache before the plan needs them, by one thread of each training process.

The plan knows which shards come next. Where several processes of a node share a cache, each passes over the shards that
another is fetching, so together they fetch several at a time, and none twice.
"""

import threading
from collections.abc import Sequence
from itertools import accumulate

from mmtrain.data.cache import ShardCache
from mmtrain.data.index import Shard
from mmtrain.data.shards import is_remote

CLOSE_SECONDS = 5.0
"""How long the end of a download is waited for; a read that hangs ends with the process."""


class Fetcher:
    """Keeps the cache ahead of the plan: as far as `limit` bytes, the cache's size, reach."""

    def __init__(self, cache: ShardCache, limit: int) -> None:
        """Nothing runs until a remote shard is wanted."""
        self._cache, self._limit = cache, limit
        self._wanted: Sequence[Shard] = ()
        self._failed: set[str] = set()
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def want(self, now: Sequence[Shard], following: Sequence[Shard]) -> None:
        """Have the remote ones of these shards in the cache, those needed now first, instead of what was wanted before.

        As many as fit together, and none of them is removed for another: all copies of them count as used just now.
        Where not even those needed now fit together, nothing is fetched ahead: it would only cost one of them its copy.
        """
        needed, remote = (
            list(dict.fromkeys(shard for shard in shards if is_remote(shard.path)))
            for shards in (now, [*now, *following])
        )
        if not remote or sum(shard.header.shard_bytes for shard in needed) > self._limit:
            return
        sums = accumulate(shard.header.shard_bytes for shard in remote)
        self._wanted = [shard for shard, total in zip(remote, sums, strict=True) if total <= self._limit]
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """Fetch until the end."""
        while self._wake.wait() and not self._ended.is_set():
            self._wake.clear()
            missing = [shard for shard in self._wanted if not self._cache.held(shard.path, shard.header.shard_bytes)]
            for shard in missing:
                if self._wake.is_set():  # other shards are wanted by now
                    break
                if shard.path not in self._failed:
                    self._fetch(shard)

    def _fetch(self, shard: Shard) -> None:
        """One try; who needs the shard will try again, and say what is wrong."""
        try:
            self._cache.ahead(shard.path, shard.header.shard_bytes, lambda: not self._ended.is_set())
        except Exception:  # each way to a shard has errors of its own
            self._failed.add(shard.path)

    def close(self) -> None:
        """End the thread; what it was fetching is dropped."""
        self._ended.set()
        self._wake.set()
        if self._thread:
            self._thread.join(CLOSE_SECONDS)
