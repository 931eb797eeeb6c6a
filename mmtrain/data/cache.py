"""Copies of remote shards on this node: fetched once, shared by its processes, bounded in size.

A folder of NAME.tar (whole copies), NAME.tar.partial (being fetched) and NAME.lock. Only who holds NAME.lock writes
NAME, and a copy appears by a rename, so two processes that want one shard fetch it once, and what a killed process
leaves is no copy. Locks end with their process. Where room is short, the copy that was used longest ago goes.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import BinaryIO

from mmtrain.config.errors import DataError

TRIES = 3
"""Times that a shard is asked for, one and then four seconds apart."""

CHUNK = 1 << 20


def default_folder() -> Path:
    """Where copies lie unless the recipe says otherwise: one folder of this user in the temporary folder."""
    return Path(tempfile.gettempdir()) / f"mmtrain-shards-{os.getuid()}"


class ShardCache:
    """Local copies of remote shards."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Keep at most `limit` bytes in `folder`, which is made when the first shard is fetched."""
        self._folder, self._limit = folder, limit

    def local(self, address: str, size: int | None = None) -> Path:
        """Path of a whole copy of the shard at `address`, which has `size` bytes (None: as many as come).

        The copy may be removed by another process as soon as it is not the latest any more: open it at once, and ask
        again if it is gone. DataError if it cannot be fetched, has another size, or does not fit.
        """
        copy = self._copy(address)
        if not self._used(copy, size):
            if size is not None and size > self._limit:
                raise DataError(
                    f"shard {address}: {size} bytes, more than the whole cache of {self._limit}; raise data.cache_gib"
                )
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(copy.with_suffix(".lock")):
                if not self._used(copy, size):  # somebody else may have fetched it meanwhile
                    self._fetch(address, copy, size)
        return copy

    def held(self, address: str, size: int) -> bool:
        """Whether there is a copy; if so, it now counts as used last."""
        return self._used(self._copy(address), size)

    def ahead(self, address: str, size: int, going: Callable[[], bool]) -> None:
        """Fetch a shard that will be needed, unless somebody is at it, the disk is too full, or the cache too small.

        Ends early when `going` says no. One try: DataError or OSError if it fails, and `local` will try again.
        """
        copy = self._copy(address)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if size > min(self._limit, shutil.disk_usage(self._folder).free):
            return
        try:
            with _locked(copy.with_suffix(".lock"), wait=False):
                if not self._used(copy, size):
                    self._make_room(size, copy)
                    self._download(address, copy, size, going)
                    self._make_room(0, copy)  # others may have made room for theirs while this one was short
        except BlockingIOError:
            return

    def _copy(self, address: str) -> Path:
        """Where the copy of a shard is or will be."""
        return self._folder / f"{hashlib.sha256(address.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.tar"

    @staticmethod
    def _used(copy: Path, size: int | None) -> bool:
        """Whether there is a copy; marks it as used just now."""
        try:
            now = time.time_ns()  # the file system's own clock ticks too slowly to tell two uses apart
            os.utime(copy, ns=(now, now))
            return size is None or copy.stat().st_size == size
        except FileNotFoundError:
            return False

    def _fetch(self, address: str, copy: Path, size: int | None) -> None:
        """Make a copy, or say why there is none."""
        for number in range(TRIES):
            self._make_room(size or 0, copy)
            try:
                self._download(address, copy, size, _always)
                break
            except OSError as error:
                if error.errno == errno.ENOSPC and not self._make_room(self._limit, copy):
                    raise DataError(
                        f"shard {address}: no space left for its copy in {self._folder}; free some, lower "
                        "data.cache_gib, or set data.cache to a folder on another disk"
                    ) from None
                if number == TRIES - 1:
                    raise DataError(
                        f"shard {address}: cannot be fetched ({error}), tried {TRIES} times; check the address "
                        "and the way to it"
                    ) from None
                time.sleep(4**number)
        self._make_room(0, copy)

    def _download(self, address: str, copy: Path, size: int | None, going: Callable[[], bool]) -> None:
        """One try to make a copy; none appears when `going` says no. OSError if it breaks off."""
        partial = copy.with_suffix(".tar.partial")
        try:
            found, most = 0, inf if size is None else size
            with _open(address) as source, partial.open("wb") as target:
                while going() and found <= most and (chunk := source.read(CHUNK)):
                    found += target.write(chunk)
            if not going():
                return
            if size is not None and found != size:
                raise DataError(
                    f"shard {address}: {found} bytes came, but {size} when indexed; it changed, index it again with "
                    "`python -m tools.index_shards`"
                )
            partial.replace(copy)
            self._used(copy, size)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int, wanted: Path) -> int:
        """Remove the copies used longest ago until `size` more bytes fit; returns how many went. `wanted` stays."""
        with _locked(self._folder / "room.lock"):
            files = []
            for path in [*self._folder.glob("*.tar"), *self._folder.glob("*.tar.partial")]:
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                files.append((stat.st_mtime_ns, stat.st_size, path))
            total, removed = size + sum(length for _, length, _ in files), 0
            for _, length, path in sorted(files):
                if total <= self._limit:
                    break
                if path.name.split(".")[0] == wanted.stem or (path.suffix == ".partial" and _is_locked(path)):
                    continue
                path.unlink(missing_ok=True)
                total -= length
                removed += 1
        return removed


def _always() -> bool:
    """What is needed now is fetched to its end."""
    return True


def _open(address: str) -> BinaryIO:
    """A stream of what lies at `address`, by webdataset where it knows the scheme, else by fsspec (s3, ...)."""
    # webdataset.gopen, the function, hides the module of that name.
    from webdataset.gopen import gopen, gopen_schemes

    scheme = address.partition(":")[0]
    if scheme in gopen_schemes or scheme == "file":
        return gopen(address)
    import fsspec

    try:
        return fsspec.open(address, "rb").open()
    except (ImportError, ValueError) as error:
        raise DataError(f"shard {address}: {error}; install what fsspec needs for it") from None


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`; it goes with the process if not before. BlockingIOError: it is held, do not `wait`."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _is_locked(partial: Path) -> bool:
    """Whether somebody is writing this copy."""
    try:
        with _locked(partial.with_suffix("").with_suffix(".lock"), wait=False):
            return False
    except BlockingIOError:
        return True
