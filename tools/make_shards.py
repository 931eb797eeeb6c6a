"""Make shards and their indexes from data in a public format, or index an existing folder of tars (wds).

python -m tools.make_shards captions train.jsonl --images images --out shards/captions --tokenizer tokenizer.json
python -m tools.make_shards wds FOLDER --tokenizer tokenizer.json

captions     JSON lines: image, caption (and id, if there is one)
interleaved  JSON lines in OBELICS form: texts and images of equal length, one of each pair null
text         JSON lines: text
instruct     LLaVA's JSON list, or JSON lines: image (path, list or none), conversations
wds          a folder of .tar shards: img2dataset output, or shards made by this tool (indexed anew in place)

A bad record stops the tool before anything is written; --skip-bad leaves bad records out and lists them in
OUT/skipped.jsonl. In foreign tars bad samples stay where they are and are marked in the index.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmtrain.config.errors import DataError, UserError
from mmtrain.data.chat import TEMPLATES
from mmtrain.data.columns import Index
from mmtrain.data.formats import READERS, Problem, Record, read_records
from mmtrain.data.index import build_index, shard_paths, write_index
from mmtrain.data.shards import ShardWriter
from mmtrain.data.tokenizer import Tokenizer
from tools.train_tokenizer import train

SHOWN = 20
"""Problems listed at most; without --skip-bad reading stops there."""


def make_shards(
    name: str,
    source: Path,
    images: Path,
    out: Path,
    tokenizer: Tokenizer,
    samples_per_shard: int = 1000,
    skip_bad: bool = False,
    renumber: bool = False,
) -> tuple[list[Index], list[Problem]]:
    """Convert `source` into indexed shards in the new folder `out`; returns their indexes and the skipped records.

    Written beside `out` and renamed at the end, so that `out` is complete or absent. Same input, same bytes. DataError
    with the first problem and their number if a record is bad and not `skip_bad`, or if none is good.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"output {out}: exists already; choose another folder or delete it")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # what an interrupted run of this tool left
    partial.mkdir(parents=True)
    try:
        problems = _write(read_records(name, source, images, renumber), partial, samples_per_shard, skip_bad)
        if problems and not skip_bad:
            raise _bad_input(problems, name)
        indexes = [build_index(tar, tokenizer)[0] for tar in sorted(partial.glob("*.tar"))]
        if not indexes:
            raise DataError(f"input {source}: no usable record, all {len(problems)} are bad; {_first(problems)}")
        for index in indexes:
            write_index(index)
        if problems:
            lines = [json.dumps(problem._asdict(), ensure_ascii=False) + "\n" for problem in problems]
            (partial / "skipped.jsonl").write_text("".join(lines), "utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return indexes, problems


def index_folder(folder: Path, tokenizer: Tokenizer) -> tuple[list[Index], list[Problem]]:
    """Index every tar of `folder` in place; returns the indexes, and what is unusable.

    No index is written before all tars could be read. DataError if no sample is usable.
    """
    indexes: list[Index] = []
    problems: list[Problem] = []
    for tar in shard_paths(folder):
        index, damage = build_index(tar, tokenizer)
        indexes.append(index)
        problems += [Problem(str(tar), damage)] if damage else []
        problems += [Problem(f"{tar}, key {e.key!r}", e.unusable) for e in index.entries if e.unusable]
    if not any(index.header.samples > index.header.unusable for index in indexes):
        raise DataError(f"data folder {folder}: no usable sample in {len(indexes)} shards; {_first(problems)}")
    for index in indexes:
        write_index(index)
    return indexes, problems


def _write(records: Iterable[Record | Problem], folder: Path, samples_per_shard: int, skip_bad: bool) -> list[Problem]:
    """Write the good records to tars in `folder` until enough problems are seen; returns the problems."""
    problems: list[Problem] = []
    writer = ShardWriter(folder, samples_per_shard)
    for record in records:
        if isinstance(record, Record):
            document = json.dumps(record.as_json(), ensure_ascii=False, separators=(",", ":")).encode()
            files = {suffix: path.read_bytes() for suffix, path in record.files.items()}
            writer.write(record.key, {"json": document, **files})
        else:
            problems.append(record)
            if len(problems) >= SHOWN and not skip_bad:
                break
    writer.close()
    return problems


def _first(problems: Sequence[Problem]) -> str:
    """The first problem in words."""
    return f"the first: {problems[0].where}: {problems[0].why}" if problems else "they are empty"


def _bad_input(problems: Sequence[Problem], name: str) -> DataError:
    """The error for bad records, which begins with the first one."""
    more = f" (and {len(problems) - 1} more{', at least' if len(problems) >= SHOWN else ''})" if problems[1:] else ""
    error = DataError(
        f"{problems[0].where}: {problems[0].why}{more}; nothing was written; correct the {name} input, or pass "
        "--skip-bad to leave bad records out"
    )
    error.add_note("\n".join(f"{problem.where}: {problem.why}" for problem in problems))
    return error


def summary(indexes: Sequence[Index]) -> Table:
    """What the shards hold, as a table."""
    headers = [index.header for index in indexes]
    usable = [entry for index in indexes for entry in index.entries if not entry.unusable]
    longest = max((entry.tokens for entry in usable), default=0)
    sizes = {(part.width, part.height) for entry in usable for part in entry.segments if part.is_image}
    rows = {
        "shards": len(headers),
        "bytes": sum(header.shard_bytes for header in headers),
        "samples": sum(header.samples for header in headers),
        "unusable": sum(header.unusable for header in headers),
        "images": sum(header.images for header in headers),
        "image sizes": len(sizes),
        "text tokens": sum(header.tokens for header in headers),
        "learnt tokens": sum(header.supervised for header in headers),
        "longest text": longest,
    }
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for label, value in rows.items():
        table.add_row(label, f"{value:,}")
    return table


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=[*READERS, "wds"])
    parser.add_argument("input", type=Path, help="input file; for wds the folder of tars")
    parser.add_argument("--images", type=Path, help="folder that image paths are relative to (default: the input's)")
    parser.add_argument("--out", type=Path, help="new folder for the shards (not for wds)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json that counts the tokens")
    parser.add_argument("--train-tokenizer", type=int, metavar="N", help="first train it, N entries, on this input")
    parser.add_argument("--chat-template", choices=list(TEMPLATES), default="plain", help="default: plain")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad records out, list them in skipped.jsonl")
    parser.add_argument("--renumber", action="store_true", help="record numbers as keys, for inputs with repeated ids")
    return parser


def _run(args: argparse.Namespace, console: Console) -> None:
    """Do what the command line asks."""
    if args.format == "wds" and (args.out or args.train_tokenizer):
        raise DataError("wds indexes tars in place: leave --out and --train-tokenizer away")
    if args.format != "wds" and not args.out:
        raise DataError(f"{args.format}: --out is missing; name a new folder for the shards")
    if args.samples_per_shard < 1:
        raise DataError(f"--samples-per-shard {args.samples_per_shard}: must be at least 1")
    if args.train_tokenizer:
        train([args.input], args.train_tokenizer, args.tokenizer, args.chat_template)
    try:
        _make(args, Tokenizer(args.tokenizer, args.chat_template), console)
    except UserError:
        if args.train_tokenizer:
            args.tokenizer.unlink()  # made a moment ago, and in the way of the next try
        raise


def _make(args: argparse.Namespace, tokenizer: Tokenizer, console: Console) -> None:
    """Make or index the shards, and say what they hold."""
    if args.format == "wds":
        indexes, problems = index_folder(args.input, tokenizer)
        what = "unusable, marked in the index"
    else:
        images = args.images or args.input.parent
        indexes, problems = make_shards(
            args.format, args.input, images, args.out, tokenizer, args.samples_per_shard, args.skip_bad, args.renumber
        )
        what = "left out, listed in skipped.jsonl"
    console.print(str(args.out or args.input), soft_wrap=True)
    console.print(summary(indexes))
    console.print(
        f"tokenizer {tokenizer.hash[:16]}, {tokenizer.vocab_size} entries, template {args.chat_template}",
        soft_wrap=True,
    )
    for problem in problems[:SHOWN]:
        console.print(f"{what}: {problem.where}: {problem.why}", style="yellow", soft_wrap=True, markup=False)
    if problems[SHOWN:]:
        console.print(f"... and {len(problems) - SHOWN} more", style="yellow")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        _run(args, Console())
    except UserError as error:
        for note in getattr(error, "__notes__", []):
            errors.print(note)
        errors.print(f"error: {error}", style="red")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
