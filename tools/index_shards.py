"""Index tars that lie elsewhere or were made by others, in parallel; an interrupted run goes on where it was.

python -m tools.index_shards FOLDER --tokenizer F                              tars of a folder, indexes beside them
python -m tools.index_shards http://host/{000..099}.tar --tokenizer F --out DIR      remote ones, indexes in DIR
python -m tools.index_shards 's3://bucket/x.tar' 'pipe:ssh host cat x.tar' --tokenizer F --out DIR

A shard that has an index for this tokenizer and, if local, of this size, is passed over (--again indexes all).
Unusable samples are marked in the index and listed in DIR/unusable.jsonl; a shard that cannot be indexed is reported,
the others go on, and the exit code is 1. Remote tars are fetched one by one into a temporary folder, and not kept.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand
from rich.console import Console

from mmtrain.config.errors import DataError, UserError
from mmtrain.data.cache import ShardCache
from mmtrain.data.chat import TEMPLATES
from mmtrain.data.index import build_index, check_index, index_path, shard_paths, write_index
from mmtrain.data.shards import is_remote
from mmtrain.data.tokenizer import Tokenizer

SHOWN = 20
"""Problems listed at most on the terminal."""

NO_LIMIT = 1 << 62


class Job(NamedTuple):
    """One shard to index."""

    address: str
    """Path of the tar, or its address."""
    index: Path
    """Where its index goes."""


class Done(NamedTuple):
    """What became of a job."""

    job: Job
    samples: int = 0
    unusable: tuple[tuple[str, str], ...] = ()
    """(key, reason)."""
    damage: str = ""
    """What is wrong with the tar itself."""
    error: str = ""
    """Why there is no index."""


def jobs(addresses: Sequence[str], out: Path | None) -> list[Job]:
    """The shards that `addresses` (tars, folders, {a..b}) name; DataError if a remote one comes without `out`."""
    found: dict[str, Job] = {}
    for address in _expanded(addresses):
        if not is_remote(address):
            path = Path(address)
            if not path.is_file():
                raise DataError(f"shard {path}: no such file; correct the path")
            if out is not None and out.resolve() != path.parent.resolve():
                raise DataError(f"shard {path}: the index of a local tar lies beside it; leave --out away")
            found[address] = Job(address, index_path(path))
        elif out is None:
            raise DataError(f"shard {address}: --out is missing; name a folder for the indexes of remote shards")
        else:
            stem = re.sub(r"[^A-Za-z0-9_-]+", "_", address.rpartition("/")[2].removesuffix(".tar"))[-60:]
            mark = hashlib.sha256(address.encode()).hexdigest()[:8]  # two hosts may use one name
            found[address] = Job(address, out / f"{stem}-{mark}.index")
    return list(found.values())


def _expanded(addresses: Sequence[str]) -> Iterator[str]:
    """Every single shard."""
    for address in addresses:
        if is_remote(address):
            yield from [address] if address.startswith("pipe:") else braceexpand(address)
        elif Path(address).suffix == ".tar":
            yield from braceexpand(address)
        else:
            yield from map(str, shard_paths(Path(address)))


def index_all(work: Sequence[Job], tokenizer: Tokenizer, template: str, processes: int) -> Iterator[Done]:
    """Index the shards in so many processes, as they become ready."""
    if processes == 1:
        yield from (_index(job, tokenizer) for job in work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _load, (str(tokenizer.path), template)) as pool:
        for ready in as_completed([pool.submit(_index_here, job) for job in work]):
            yield ready.result()


_loaded: list[Tokenizer] = []


def _load(path: str, template: str) -> None:
    """Start of a process: its tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _loaded.append(Tokenizer(path, template))


def _index_here(job: Job) -> Done:
    """One job in a process that `_load` began."""
    return _index(job, _loaded[0])


def _index(job: Job, tokenizer: Tokenizer) -> Done:
    """Write the index of one shard."""
    try:
        if not is_remote(job.address):
            index, damage = build_index(Path(job.address), tokenizer)
        else:
            with tempfile.TemporaryDirectory(prefix="mmtrain-index-") as folder:
                copy = ShardCache(Path(folder), NO_LIMIT).local(job.address)
                index, damage = build_index(copy, tokenizer, job.address)
        write_index(index, job.index)
    except (UserError, OSError) as error:
        return Done(job, error=str(error))
    columns = index.columns
    unusable = tuple(
        (columns.text("key", n), columns.text("reason", n)) for n in columns.unusable.nonzero()[0].tolist()
    )
    return Done(job, index.header.samples, unusable, damage)


def _is_done(job: Job, tokenizer: Tokenizer) -> bool:
    """Whether the index is there and holds."""
    try:
        return check_index(job.index, tokenizer).path == job.address
    except UserError:
        return False


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="tars, folders of tars, or addresses, with {000..099} for ranges")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json that counts the tokens")
    parser.add_argument("--chat-template", choices=list(TEMPLATES), default="plain", help="default: plain")
    parser.add_argument("--out", type=Path, help="folder for indexes of remote shards")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--again", action="store_true", help="also what has an index already")
    return parser


def _run(args: argparse.Namespace, console: Console) -> int:
    """Do what the command line asks; returns the exit code."""
    if args.processes < 1:
        raise DataError(f"--processes {args.processes}: must be at least 1")
    tokenizer = Tokenizer(args.tokenizer, args.chat_template)
    every = jobs(args.shards, args.out)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    left = every if args.again else [job for job in every if not _is_done(job, tokenizer)]
    console.print(f"{len(every)} shards, {len(every) - len(left)} indexed before")
    failed, samples, unusable, shown = 0, 0, 0, 0
    for number, done in enumerate(index_all(left, tokenizer, args.chat_template, args.processes), start=1):
        samples += done.samples
        unusable += len(done.unusable)
        failed += bool(done.error)
        _report(done)
        for why in [done.error] if done.error else [done.damage, *(f"{key!r}: {why}" for key, why in done.unusable)]:
            shown += bool(why)
            if why and shown <= SHOWN:
                console.print(f"{done.job.address}: {why}", style="yellow", soft_wrap=True, markup=False)
        if number % 100 == 0:
            console.print(f"{number} of {len(left)} shards")
    console.print(f"{samples:,} samples indexed, {unusable:,} of them unusable; {failed} shards failed")
    return 1 if failed else 0


def _report(done: Done) -> None:
    """Add what is unusable to the list beside the index: lines that data.quarantine could read."""
    if not (done.unusable or done.damage or done.error):
        return
    rows = [{"shard": done.job.address, "key": key, "reason": reason} for key, reason in done.unusable]
    rows += [{"shard": done.job.address, "key": None, "reason": why} for why in (done.damage, done.error) if why]
    with (done.job.index.parent / "unusable.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return _run(args, Console())
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}", style="red")
        return 2


if __name__ == "__main__":
    sys.exit(main())
