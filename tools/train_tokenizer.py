"""Train a byte-level BPE tokenizer on the texts of input files, in any format that make_shards reads, or plain .txt.

python -m tools.train_tokenizer captions.jsonl books.jsonl instruct.json --vocab-size 4096 --out tokenizer.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmtrain.config.errors import DataError, UserError
from mmtrain.data.chat import TEMPLATES, TemplateName, template_named
from mmtrain.data.formats import texts_of
from mmtrain.data.tokenizer import Tokenizer, train_bpe


def train(files: Sequence[Path], vocab_size: int, out: Path, chat_template: TemplateName = "plain") -> Tokenizer:
    """Train on all texts of `files` and write `out`; DataError if it exists already.

    The labels of `chat_template` ("Question:") count as often as texts do: they stand around every turn.
    """
    if out.exists():
        raise DataError(
            f"tokenizer {out}: exists already; shards may depend on it, so choose another name or delete it"
        )
    texts = [text for file in files for text in texts_of(file)]
    train_bpe([*texts, *template_named(chat_template).labels() * len(texts)], vocab_size, out)
    return Tokenizer(out, chat_template)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="input files")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, special tokens included")
    parser.add_argument("--out", type=Path, required=True, help="where to write tokenizer.json")
    parser.add_argument("--chat-template", default="plain", choices=sorted(TEMPLATES), help="default: plain")
    args = parser.parse_args(argv)
    try:
        tokenizer = train(args.files, args.vocab_size, args.out, args.chat_template)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False, highlight=False)
        return 2
    short = "" if tokenizer.vocab_size == args.vocab_size else f", fewer than {args.vocab_size}: no more pairs to merge"
    entries = f"{args.out}: {tokenizer.vocab_size} entries{short}"
    Console().print(f"{entries} (model.decoder.vocab_size={tokenizer.vocab_size})", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
