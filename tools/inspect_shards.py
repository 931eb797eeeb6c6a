"""Look into shards: counts, histograms, a sheet of samples, and a lint that decodes everything.

python -m tools.inspect_shards FOLDER [--out DIR] [--samples 24] [--lint]

Writes DIR/histograms.png and DIR/samples.png (default DIR: FOLDER/inspect). --lint reads and decodes every sample and
lists what cannot be used in DIR/lint.jsonl; the exit code is 1 if there is anything.
"""

import argparse
import io
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmtrain.config.errors import DataError, UserError
from mmtrain.config.tokens import TokenKind
from mmtrain.data.cache import ShardCache, default_folder
from mmtrain.data.columns import KINDS, Index
from mmtrain.data.documents import BadSample, Content, content_of
from mmtrain.data.image import Canvas, decode_image
from mmtrain.data.index import SUFFIX, read_index
from mmtrain.data.ordering import permutation
from mmtrain.data.record import IndexEntry
from mmtrain.data.shards import is_remote, read_members

SHEET_CANVAS = Canvas(192, 256, "pad")
LINT_CANVAS = Canvas(224, 224)
CACHE_BYTES = 20 << 30
_COLOUR = "#4269d0"


def open_indexes(folder: Path) -> list[Index]:
    """Every index of a folder; DataError if there is none."""
    paths = sorted(folder.glob("*" + SUFFIX))
    if not paths:
        raise DataError(f"data folder {folder}: no indexes in it; run `python -m tools.index_shards {folder}`")
    return [read_index(path) for path in paths]


def counts(indexes: Sequence[Index]) -> Table:
    """Totals, as a table."""
    table = Table("what", "value", box=None)
    headers = [index.header for index in indexes]
    samples = sum(header.samples for header in headers)
    table.add_row("shards", f"{len(headers):,} of {sum(header.shard_bytes for header in headers) / 2**20:,.1f} MiB")
    table.add_row("samples", f"{samples:,}")
    kinds = np.concatenate([index.columns["kind"] for index in indexes])
    usable = ~np.concatenate([index.columns.unusable for index in indexes])
    for number, kind in enumerate(KINDS):
        if found := int(((kinds == number) & usable).sum()):
            table.add_row(f"  {kind}", f"{found:,}")
    table.add_row("unusable", f"{sum(header.unusable for header in headers):,}")
    for name in ("images", "tokens", "supervised"):
        total = sum(getattr(header, name) for header in headers)
        table.add_row(name, f"{total:,} ({total / max(samples, 1):.1f} a sample)")
    table.add_row("tokenizers", ", ".join(sorted({header.tokenizer_hash[:16] for header in headers})))
    return table


def histograms(indexes: Sequence[Index], path: Path) -> Path:
    """Draw tokens, images and bytes a sample, and sizes of images."""

    def by_sample(index: Index, values: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[index.columns["segment_end"]], prepend=0)[~index.columns.unusable]

    columns = [index.columns for index in indexes]
    tokens = np.concatenate([by_sample(index, index.columns["segment_tokens"]) for index in indexes])
    images = np.concatenate([by_sample(index, index.columns["segment_kind"] == TokenKind.IMAGE) for index in indexes])
    size = np.concatenate([column["size"][~column.unusable] for column in columns]) / 1024
    is_image = np.concatenate([column["segment_kind"] == TokenKind.IMAGE for column in columns])
    width, height = (np.concatenate([c[f"segment_{side}"] for c in columns])[is_image] for side in ("width", "height"))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    figure.suptitle(f"{len(tokens):,} usable samples in {len(indexes)} shards", x=0.01, ha="left")
    for at, values, what in ((axes[0][0], tokens, "text tokens a sample"), (axes[1][0], size, "KiB a sample")):
        if len(values):
            low, high = max(values.min(), 1), max(values.max(), 2)
            at.hist(values, bins=np.geomspace(low, high * 1.01, 41), color=_COLOUR)
            at.set_xscale("log")
        at.set_xlabel(what)
    most = int(images.max(initial=0))
    axes[0][1].hist(images, bins=np.arange(-0.5, most + 1.5, max(1, most // 40)), color=_COLOUR)
    axes[0][1].set_xlabel("images a sample")
    axes[1][1].scatter(width, height, s=6, alpha=0.3, color=_COLOUR, linewidths=0)
    axes[1][1].set_xlabel(f"width of {len(width):,} images, pixels")
    axes[1][1].set_ylabel("height, pixels")
    axes[1][1].set_xlim(left=0)
    axes[1][1].set_ylim(bottom=0)
    for row in axes:
        for at in row:
            at.spines[["top", "right"]].set_visible(False)
    for at in (axes[0][0], axes[0][1], axes[1][0]):
        at.set_ylabel("samples")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def contact_sheet(indexes: Sequence[Index], path: Path, samples: int) -> Path:
    """Draw the first image and the text of `samples` samples, drawn at random but the same every time."""
    where = [(index, row) for index in indexes for row in np.flatnonzero(~index.columns.unusable).tolist()]
    chosen = [where[number] for number in sorted(permutation(len(where), 0, "contact sheet")[:samples].tolist())]
    columns = 4
    rows = max(1, -(-len(chosen) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.7 * rows), layout="constrained", squeeze=False)
    for at in axes.flat:
        at.axis("off")
    for at, (index, row) in zip(axes.flat, chosen, strict=False):
        entry = index.columns.entry(row)
        try:
            members = members_of(index, entry)
            content = content_of(members)
            names = content.image_names()
            pixels = decode_image(members[names[0]], SHEET_CANVAS)[0].transpose(1, 2, 0) if names else None
            plural = "" if len(names) == 1 else "s"
            title, words = f"{entry.key}: {content.kind}, {len(names)} image{plural}", text_of(content)
        except BadSample as error:
            pixels, title, words = None, f"{entry.key}: unusable", str(error)
        if pixels is not None:
            at.imshow(pixels)
        at.set_title(title, fontsize=7, loc="left", parse_math=False)
        lines = textwrap.wrap(words, 58)[: 4 if pixels is not None else 16]
        place = (0, -0.02) if pixels is not None else (0, 0.98)
        at.text(*place, "\n".join(lines), fontsize=6.5, va="top", transform=at.transAxes, parse_math=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def text_of(content: Content) -> str:
    """All text of a document on one line; <image> where an image stands."""
    if content.turns:
        return " ".join(f"[{turn.role}] {turn.text}" for turn in content.turns)
    return " ".join("<image>" if text is None else text for text in content.texts)


def members_of(index: Index, entry: IndexEntry) -> dict[str, bytes]:
    """Files of a sample, fetched first if its shard is remote."""
    if not is_remote(index.path):
        return read_members(index.path, entry)
    return read_members(ShardCache(default_folder(), CACHE_BYTES).local(index.path, index.header.shard_bytes), entry)


def lint(indexes: Sequence[Index]) -> Iterator[dict[str, str]]:
    """Shard, key and reason of every sample that cannot be used, after reading and decoding all of them."""
    for index in indexes:
        for entry in index.entries:
            try:
                if entry.unusable:
                    raise BadSample(entry.unusable)
                members = members_of(index, entry)
                for name in content_of(members).image_names():
                    decode_image(members[name], LINT_CANVAS)
                    with Image.open(io.BytesIO(members[name])) as image:
                        size = image.size
                    if not any(segment.is_image and segment[3:] == size for segment in entry.segments):
                        raise BadSample(f"member {name} is {size[0]} x {size[1]} pixels, unlike its index")
            except BadSample as error:
                yield {"shard": index.path, "key": entry.key, "reason": str(error)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of shards with their indexes")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: FOLDER/inspect)")
    parser.add_argument("--samples", type=int, default=24, help="samples on the sheet (default: 24)")
    parser.add_argument("--lint", action="store_true", help="read and decode every sample")
    args = parser.parse_args(argv)
    console = Console()
    try:
        indexes = open_indexes(args.folder)
        out = args.out or args.folder / "inspect"
        out.mkdir(parents=True, exist_ok=True)
        console.print(counts(indexes))
        console.print(str(histograms(indexes, out / "histograms.png")), soft_wrap=True)
        console.print(str(contact_sheet(indexes, out / "samples.png", args.samples)), soft_wrap=True)
        bad = list(lint(indexes)) if args.lint else []
        if args.lint:
            (out / "lint.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad), "utf-8")
            console.print(f"{len(bad)} samples cannot be used" + (f", listed in {out / 'lint.jsonl'}" if bad else ""))
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
