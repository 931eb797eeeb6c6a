"""Tars of samples: writing them byte for byte reproducibly, listing a foreign one, reading a sample by byte range."""

import errno
import io
import os
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from mmtrain.config.errors import DataError
from mmtrain.data.documents import BadSample
from mmtrain.data.record import IndexEntry, Member

BLOCK = 512
"""Bytes of a tar block: headers and contents start on multiples of it."""


GARBLED = (ValueError, OverflowError, MemoryError, RecursionError, OSError)
"""What tarfile raises on garbled headers, besides its own errors."""

T = TypeVar("T")

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""Errors that a network file system gives while a server is away or has failed over."""


def is_remote(shard: str) -> bool:
    """Whether a shard is named by an address (http, s3, ..., or `pipe:` and a command) instead of a path."""
    return shard.startswith("pipe:") or "://" in shard


class RawSample(NamedTuple):
    """A run of neighbouring members with one key."""

    key: str
    """Member name up to the first dot of its last path component (WebDataset's rule)."""
    offset: int
    """First byte of the run."""
    size: int
    """Bytes of the run."""
    members: tuple[Member, ...]
    """Its files."""
    damage: str = ""
    """Why it cannot be whole, if the tar ends inside it."""


class Scan(NamedTuple):
    """What a tar holds."""

    samples: list[RawSample]
    """Samples in tar order."""
    damage: str
    """What is wrong with the tar itself (its tail is missing or garbled); empty for a good one."""


class ShardWriter:
    """Writes samples to shard-000000.tar, shard-000001.tar, ... in one folder.

    Same samples, same bytes: no time stamps, owners or modes of this machine.
    """

    def __init__(self, folder: Path, samples_per_shard: int) -> None:
        """Write into `folder`, which exists; a new tar begins after every `samples_per_shard` samples."""
        self._folder = folder
        self._per_shard = samples_per_shard
        self._written = 0
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: suffix -> content, written in the mapping's order."""
        if self._written % self._per_shard == 0:
            self.close()
            path = self._folder / f"shard-{self._written // self._per_shard:06d}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (open over many calls)
        for suffix, content in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            self._tar.addfile(info, io.BytesIO(content))
        self._written += 1

    def close(self) -> None:
        """Finish the open tar."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None


def scan(path: Path) -> Scan:
    """List the samples of an uncompressed tar in one pass over its headers.

    DataError if it is no tar, or if it could harm whoever unpacks it: absolute names, `..`, links, devices.
    """
    samples: list[RawSample] = []
    size = path.stat().st_size
    damage = ""
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                last = -1
                for info in tar:
                    if info.size < 0 or info.offset <= last:  # would send the reader back for ever
                        damage = f"a member of {info.size} bytes at byte {info.offset}, what follows it is lost"
                        break
                    last = info.offset
                    if info.isdir():
                        continue
                    _refuse_unsafe(path, info)
                    _append(samples, info)
            except tarfile.ReadError:
                damage = f"the tar ends early, at byte {size}"
            except DataError:
                raise
            except GARBLED as error:
                damage = f"garbled header ({error}), what follows it is lost"
            end = tar.offset
    except DataError:
        raise
    except (tarfile.ReadError, *GARBLED) as error:
        raise DataError(
            f"shard {path}: not a readable tar ({error}); unpack compressed tars first, fetch a broken one again"
        ) from None
    if not damage:
        return Scan(samples, _tail_damage(path, end))
    if samples:
        samples[-1] = samples[-1]._replace(damage=damage, size=size - samples[-1].offset)
    return Scan(samples, damage)


def read_members(path: str | Path, entry: IndexEntry | RawSample) -> dict[str, bytes]:
    """Files of one sample, suffix -> content, by a single read of its byte range.

    BadSample if the tar is shorter than its index says; DataError if it is gone, or another sample lies there.
    """
    try:
        run = patiently(lambda: _read_run(path, entry.offset, entry.size))
    except FileNotFoundError:
        raise DataError(f"shard {path}: no such file, though its index lists it; restore it or index again") from None
    except OSError as error:  # no permission, a stale handle, a disk that fails: no sample's fault
        raise DataError(
            f"shard {path}: cannot be read ({error.strerror}); mend that, then run the same command"
        ) from None
    if len(run) < entry.size:
        raise BadSample(f"the shard ends early: {len(run)} of {entry.size} bytes")
    name = f"{entry.key.rpartition('/')[2]}.".encode("utf-8", "surrogateescape")
    if name not in run[: entry.members[0].offset - entry.offset]:  # the first member's header
        raise DataError(
            f"shard {path}, sample {entry.key}: not at byte {entry.offset} any more, the shard changed since it was "
            f"indexed; run `python -m tools.make_shards wds {Path(path).parent} --tokenizer F`"
        )
    starts = [(member.suffix, member.offset - entry.offset, member.size) for member in entry.members]
    return {suffix: run[start : start + length] for suffix, start, length in starts}


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives; asked again, one and four seconds later, after an error that passes."""
    for seconds in (1, 4):
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(seconds)
    return read()


def _read_run(path: str | Path, offset: int, size: int) -> bytes:
    """Bytes offset .. offset + size - 1 of a file; fewer where it ends before."""
    file = os.open(path, os.O_RDONLY)
    try:
        run = os.pread(file, size, offset)
        while len(run) < size and (more := os.pread(file, size - len(run), offset + len(run))):
            run += more
        return run
    finally:
        os.close(file)


def _append(samples: list[RawSample], info: tarfile.TarInfo) -> None:
    """Add a member to the last sample if it has the same key, else begin a new sample."""
    directory, _, name = info.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    key = f"{directory}/{stem}" if directory else stem
    member = Member(suffix.lower(), info.offset_data, info.size)
    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
    if samples and samples[-1].key == key:
        last = samples[-1]
        samples[-1] = last._replace(size=end - last.offset, members=(*last.members, member))
    else:
        samples.append(RawSample(key, info.offset, end - info.offset, (member,)))


def _refuse_unsafe(path: Path, info: tarfile.TarInfo) -> None:
    """DataError if unpacking this member could write or point outside its folder."""
    name = PurePosixPath(info.name)
    if name.is_absolute():
        why = "an absolute path"
    elif ".." in name.parts:
        why = "'..' in its path"
    elif info.issym() or info.islnk():
        why = f"a link (to {info.linkname!r})"
    elif info.issparse():
        why = "a sparse file"
    elif not info.isreg():
        why = "a device or another special file"
    else:
        return
    raise DataError(
        f"shard {path}, member {info.name!r}: {why} has no place in a shard; pack the folder again without it"
    )


def _tail_damage(path: Path, end: int) -> str:
    """Judge what follows the last readable member; a block of zeros is a tar's proper end."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(BLOCK)
    if block.strip(b"\0"):
        return f"garbled header at byte {end}, what follows it is lost"
    return "" if block else f"no end mark at byte {end}, samples after it may be lost"
