"""Byte-level BPE tokenizers: training one, and loading any `tokenizer.json` with the special tokens a run needs."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from mmtrain.config.errors import DataError
from mmtrain.data.chat import CHAT_TOKENS, END_OF_TEXT, IMAGE_MARK, TemplateName, recognise, template_named

CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

PAD, END = "<pad>", "<eos>"

KNOWN_ENDS = (END, "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos_token>")
"""Names that public tokenizers give their end-of-text token, in the order they are looked for."""

KNOWN_PADS = (PAD, "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer:
    """A tokenizer with one chat template: text to ids and back, the special ids, and the hash that indexes carry.

    Special tokens that the file lacks (`<image>`, padding, the template's) are added after its last id, so
    `vocab_size` may exceed the file's; the model's vocabulary must hold them.
    """

    def __init__(self, path: str | Path, chat_template: TemplateName | Literal["auto"] = "plain") -> None:
        """Load `path`, a tokenizer.json or the folder that holds one; DataError if it is missing or unreadable.

        `auto` takes the chat template of the same folder (chat_template.jinja, or else tokenizer_config.json);
        DataError if it is unknown.
        The end-of-text token is the `eos_token` of a tokenizer_config.json in the same folder, else a known name.
        """
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        """The tokenizer.json that was loaded."""
        if not self.path.is_file():
            raise DataError(
                f"tokenizer {self.path}: no such file; train one with `python -m tools.train_tokenizer` or give the "
                "path of a tokenizer.json"
            )
        content = self.path.read_bytes()
        try:
            self._fast = FastTokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for every defect of a file
            raise DataError(
                f"tokenizer {self.path}: not a readable tokenizer.json ({error}); get the file anew"
            ) from None
        self._fast.no_truncation()
        self._fast.no_padding()
        if chat_template == "auto":
            chat_template = recognise(_chat_template(self.path))
        self.template = template_named(chat_template)
        """The chat template of conversations."""
        self.eos = _end_token(self._fast, self.path)
        """Content of the end-of-text token."""
        self.pad = next((name for name in KNOWN_PADS if self._fast.token_to_id(name) is not None), PAD)
        """Content of the padding token."""
        special = (self.pad, self.eos, IMAGE_MARK, *self.template.special_tokens)
        self._fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
        # Text of a user must never turn into a control token: only the template writes those.
        self._fast.encode_special_tokens = True
        self.pad_id, self.eos_id, self.image_id = (self.special_id(name) for name in special[:3])
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        """Ids, added special tokens included."""
        identity = json.dumps({"template": chat_template, "special": special}, sort_keys=True).encode()
        self.hash: str = hashlib.sha256(content + b"\0" + identity).hexdigest()
        """Identity of everything that can change a token count: file content, template and special tokens."""

    def files(self) -> dict[str, bytes]:
        """What a checkpoint must hold to load it again: name -> content."""
        beside = [path for name in (CONFIG, CHAT_TEMPLATE) if (path := self.path.parent / name).is_file()]
        return {"tokenizer.json": self.path.read_bytes()} | {path.name: path.read_bytes() for path in beside}

    def as_json(self) -> str:
        """A tokenizer.json with the special tokens that were added."""
        return self._fast.to_str(pretty=True)

    def special_id(self, name: str) -> int:
        """Id of the special token `name`; END_OF_TEXT means `eos`. DataError if the tokenizer has no such token."""
        number = self._fast.token_to_id(self.eos if name == END_OF_TEXT else name)
        if number is None:
            raise DataError(f"tokenizer {self.path}: has no token {name!r}")
        return number

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without any special token."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores (TOKENIZERS_PARALLELISM=false: on one)."""
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`, by default without special tokens."""
        return self._fast.decode([int(number) for number in ids], skip_special_tokens=skip_special)

    def end_ids(self) -> frozenset[int]:
        """Ids at which generation stops: end of text, and the template's end of a turn."""
        return frozenset({self.eos_id, self.special_id(self.template.end.text)})


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a byte-level BPE on `texts` and write it to `out`; DataError if `vocab_size` cannot hold all bytes.

    The file has fewer than `vocab_size` entries when the texts run out of pairs to merge. All chat templates' tokens
    are in it.
    """
    special = [PAD, END, IMAGE_MARK, *CHAT_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(special) + len(alphabet)
    if vocab_size < least:
        raise DataError(
            f"vocabulary of {vocab_size}: too small for {len(alphabet)} bytes and {len(special)} special tokens; "
            f"give at least {least}"
        )
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    fast.save(str(out))
    return out


def _config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json; {} where there is none. DataError: it is not JSON."""
    file = path.parent / CONFIG
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); get the file anew") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: a JSON {type(fields).__name__}, not an object; get the file anew")
    return fields


def _chat_template(path: Path) -> str:
    """The public chat template beside a tokenizer.json; empty where there is none."""
    file = path.parent / CHAT_TEMPLATE
    return file.read_text("utf-8") if file.is_file() else str(_config(path).get("chat_template") or "")


def _end_token(fast: FastTokenizer, path: Path) -> str:
    """Content of the end-of-text token; DataError if none can be found."""
    config = path.parent / CONFIG
    declared = _config(path).get("eos_token")
    declared = declared.get("content") if isinstance(declared, dict) else declared
    if declared is not None and not isinstance(declared, str):
        raise DataError(f"{config}: eos_token is {declared!r}, not text; correct it, or get the file anew")
    names = [declared] if declared else list(KNOWN_ENDS)
    for name in names:
        if fast.token_to_id(name) is not None:
            return name
    raise DataError(
        f"tokenizer {path}: none of {', '.join(names)} is in it, so documents cannot end; name its end token as "
        f"eos_token in {config}"
    )
