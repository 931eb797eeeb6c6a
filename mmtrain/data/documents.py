"""What a sample's files mean and which tokens they become: the one definition, for the indexer and for the loader.

Content (texts, images, turns) -> outline (runs between images) -> parts (token ids between image bytes). The indexer
counts the parts that the loader will decode, so planned and decoded token counts agree by construction; the loader
checks it all the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mmtrain.config.errors import DataError
from mmtrain.config.tokens import TokenKind
from mmtrain.data.chat import END_OF_TEXT, IMAGE_MARK, ImageMark, Run, Turn, conversation_pieces
from mmtrain.data.record import Document, DocumentKind, ImagePart, IndexEntry, Segment, Text
from mmtrain.data.tokenizer import Tokenizer

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Endings of image members, in lower case."""

PARAGRAPH = "\n\n"
"""Between two texts that no image separates."""

MAX_JSON_BYTES = 16 << 20
"""Larger JSON members are refused before parsing."""

_KINDS = ("caption", "interleaved", "text", "conversation")


class BadSample(Exception):
    """This sample cannot be used, all others can: a reason for the ledger, never for stopping."""


@dataclass(frozen=True)
class Content:
    """A document as its author wrote it. Images are named, not held."""

    kind: DocumentKind
    """caption, interleaved, text: `texts` and `images` of equal length, one of each pair None. conversation: turns."""
    texts: tuple[str | None, ...] = ()
    """Texts in document order, None where an image stands."""
    images: tuple[str | None, ...] = ()
    """Image names in document order, None where a text stands; in a conversation one for each `<image>`, no None."""
    turns: tuple[Turn, ...] = ()
    """Turns of a conversation."""

    def image_names(self) -> list[str]:
        """Names of the images in document order."""
        return [name for name in self.images if name is not None]

    def as_json(self) -> dict[str, Any]:
        """The canonical form that KEY.json holds."""
        if self.kind == "conversation":
            return {
                "kind": self.kind,
                "turns": [{"role": turn.role, "text": turn.text} for turn in self.turns],
                "images": list(self.images),
            }
        return {"kind": self.kind, "texts": list(self.texts), "images": list(self.images)}


Outline = list[tuple[Run, ...] | str]
"""A document's runs of text between its images' names: one item for each segment."""


def content_defect(content: Content) -> str:
    """What is wrong with `content`, in words; empty if nothing is."""
    return _structure_defect(content) or _surrogate_defect(content)


def _surrogate_defect(content: Content) -> str:
    """JSON can spell half of a character (a lone surrogate), which no tokenizer takes."""
    try:
        for text in (*content.texts, *(turn.text for turn in content.turns)):
            if text is not None:
                text.encode()
    except UnicodeEncodeError as error:
        return f"text holds half of a character (\\u{ord(error.object[error.start]):x})"
    return ""


def _structure_defect(content: Content) -> str:
    """What is missing, empty, or of another type than it must be."""
    named = content.images if content.kind == "conversation" else content.image_names()
    for name in named:
        if not isinstance(name, str):
            return f"images holds {str(name)[:80]!r}, not text"
    if content.kind == "conversation":
        return _conversation_defect(content)
    if len(content.texts) != len(content.images):
        return f"texts has {len(content.texts)} items but images {len(content.images)}; they must be equally long"
    for number, (text, image) in enumerate(zip(content.texts, content.images, strict=True)):
        if (text is None) == (image is None):
            state = "null" if text is None else "given"
            return f"texts[{number}] and images[{number}] are both {state}; exactly one of each pair must be null"
        if text is not None and not _has_words(text):
            what = {"caption": "caption", "interleaved": f"texts[{number}]", "text": "text"}[content.kind]
            return f"empty {what}" if isinstance(text, str) else f"{what} is {text!r}, not text"
    return "" if content.texts else "neither texts nor images"


def _has_words(text: Any) -> bool:
    """Whether `text` is a text with something in it."""
    return isinstance(text, str) and bool(text.strip())


def _conversation_defect(content: Content) -> str:
    """`content_defect` of a conversation."""
    names = {"user": "human", "assistant": "gpt"}
    for number, turn in enumerate(content.turns):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            found = names.get(turn.role, turn.role) if isinstance(turn.role, str) else turn.role
            return (
                f"turn {number} is from {str(found)[:80]!r}, expected {names[expected]!r}; human and "
                "gpt must alternate, human first"
            )
        if not _has_words(turn.text):
            return f"turn {number} (from {names[turn.role]!r}) is empty"
        if turn.role == "assistant" and IMAGE_MARK in turn.text:
            return f"turn {number} is an answer that holds {IMAGE_MARK}; images belong to human turns"
    if not content.turns or len(content.turns) % 2:
        return f"{len(content.turns)} turns, the last one without an answer; human and gpt turns come in pairs"
    marks = sum(turn.text.count(IMAGE_MARK) for turn in content.turns)
    if marks != len(content.images):
        return f"{marks} {IMAGE_MARK} in the turns but {len(content.images)} images; there must be one for each image"
    return ""


def content_of(members: Mapping[str, bytes]) -> Content:
    """The document that a sample's files hold, from suffix -> bytes; BadSample if they hold none.

    Our own layout has `kind` in KEY.json. Without it the sample is one image with a caption, from KEY.txt or from
    `caption` in KEY.json (img2dataset).
    """
    fields: dict[str, Any] = {}
    if "json" in members:
        if len(members["json"]) > MAX_JSON_BYTES:
            raise BadSample(f"JSON of {len(members['json'])} bytes, more than the {MAX_JSON_BYTES} that are read")
        try:
            fields = json.loads(members["json"])
        # ValueError: no UTF-8, no JSON, or a number of thousands of digits; RecursionError: nested beyond reason.
        except (ValueError, RecursionError) as error:
            raise BadSample(f"broken JSON: {error}") from None
        if not isinstance(fields, dict):
            raise BadSample("JSON is not an object")
    content = _canonical(fields) if "kind" in fields else _foreign(fields, members)
    defect = content_defect(content)
    if defect:
        raise BadSample(defect)
    missing = [name for name in content.image_names() if name not in members]
    if missing:
        raise BadSample(f"member {missing[0]} is missing")
    return content


def _canonical(fields: dict[str, Any]) -> Content:
    """Content of a KEY.json of our own layout."""
    kind = fields["kind"]
    if kind not in _KINDS:
        raise BadSample(f"unknown kind {kind!r}")
    try:
        if kind == "conversation":
            turns = tuple(Turn(turn["role"], turn["text"]) for turn in fields["turns"])
            return Content(kind, images=tuple(fields["images"]), turns=turns)
        return Content(kind, texts=tuple(fields["texts"]), images=tuple(fields["images"]))
    except (KeyError, TypeError) as error:
        raise BadSample(f"JSON of kind {kind} lacks or garbles a field: {error!r}") from None


def _foreign(fields: dict[str, Any], members: Mapping[str, bytes]) -> Content:
    """Content of an image with a caption beside it."""
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise BadSample(f"{len(images)} images in a sample without a canonical JSON, expected 1")
    if "txt" in members:
        try:
            caption = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample(f"caption is not UTF-8: {error}") from None
    else:
        caption = fields.get("caption")
        if not isinstance(caption, str):
            raise BadSample("no caption: neither a .txt member nor `caption` in the JSON")
    return Content("caption", texts=(None, caption.strip()), images=(images[0], None))


def outline(content: Content, tokenizer: Tokenizer) -> Outline:
    """What `content` becomes, segment by segment: runs of text, and names of images.

    Caption, interleaved and text documents: all text is learnt, two neighbouring texts are parted by a blank line, the
    end token closes the document. Conversations follow the chat template, whose answers end themselves.
    """
    if content.kind == "conversation":
        names = iter(content.images)
        pieces = conversation_pieces(content.turns, tokenizer.template)
        return [next(names) if isinstance(piece, ImageMark) else piece for piece in pieces]
    out: Outline = []
    for text, image in zip(content.texts, content.images, strict=True):
        if image is not None:
            out.append(image)
        else:
            between = PARAGRAPH if out and not isinstance(out[-1], str) else ""
            out.append((Run(between + text, supervised=True),))
    end = Run(END_OF_TEXT, special=True, supervised=True)
    if isinstance(out[-1], str):
        out.append((end,))
    else:
        out[-1] = (*out[-1], end)
    return out


def encode_outlines(outlines: Sequence[Outline], tokenizer: Tokenizer) -> list[list[Text | str]]:
    """Token ids and loss masks of every outline, images' names left in place; all text in one call of the tokenizer."""
    runs = [run for item in outlines for piece in item if not isinstance(piece, str) for run in piece]
    encoded = iter(tokenizer.encode_batch([run.text for run in runs if not run.special]))
    out: list[list[Text | str]] = []
    for item in outlines:
        parts: list[Text | str] = []
        for piece in item:
            if isinstance(piece, str):
                parts.append(piece)
                continue
            ids: list[int] = []
            mask: list[bool] = []
            for run in piece:
                added = [tokenizer.special_id(run.text)] if run.special else next(encoded)
                ids += added
                mask += [run.supervised] * len(added)
            if not parts:
                mask[:1] = [False]  # nothing precedes the first token of a document, so nothing predicts it
            parts.append(Text(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)))
        out.append(parts)
    return out


def segments_of(parts: Sequence[Text | str], sizes: Mapping[str, tuple[int, int]]) -> tuple[Segment, ...]:
    """What the index says about encoded `parts`; `sizes` maps image name -> (width, height)."""
    out = []
    for part in parts:
        if isinstance(part, str):
            out.append(Segment(TokenKind.IMAGE, width=sizes[part][0], height=sizes[part][1]))
        else:
            out.append(Segment(TokenKind.TEXT, len(part.token_ids), int(part.supervised.sum())))
    return tuple(out)


class Found(NamedTuple):
    """A sample as it lies in its shard."""

    shard: str
    """Path of the tar."""
    entry: IndexEntry
    """What its index says."""
    members: Mapping[str, bytes]
    """Its files, by suffix in lower case."""


def decode_documents(found: Sequence[Found], tokenizer: Tokenizer) -> list[Document | BadSample]:
    """The document of every sample, or what makes its files unusable; all text in one call of the tokenizer.

    DataError if a document's parts are not what the index planned: then the plan is worthless and the run must stop.
    """
    contents: list[Content | BadSample] = []
    for _, entry, members in found:
        try:
            if entry.unusable:
                raise BadSample(entry.unusable)
            contents.append(content_of(members))
        except BadSample as error:
            contents.append(error)
    outlines = [outline(content, tokenizer) for content in contents if isinstance(content, Content)]
    encoded = iter(encode_outlines(outlines, tokenizer))
    return [
        content if isinstance(content, BadSample) else _as_planned(sample, content, next(encoded))
        for sample, content in zip(found, contents, strict=True)
    ]


def _as_planned(sample: Found, content: Content, parts: Sequence[Text | str]) -> Document:
    """The document; DataError if its parts have other tokens than its index says."""
    shard, entry, members = sample
    sizes = [(True, 0) if isinstance(part, str) else (False, len(part.token_ids)) for part in parts]
    if sizes != [(segment.is_image, segment.tokens) for segment in entry.segments]:
        tokens = sum(len(part.token_ids) for part in parts if isinstance(part, Text))
        raise DataError(
            f"shard {shard}, sample {entry.key}: {tokens} text tokens in {len(parts)} parts, but its index planned "
            f"{entry.tokens} in {len(entry.segments)}; index the folder again with "
            "`python -m tools.make_shards wds FOLDER --tokenizer F`"
        )
    return document_of(entry.key, content.kind, parts, members)


def document_of(key: str, kind: DocumentKind, parts: Sequence[Text | str], images: Mapping[str, bytes]) -> Document:
    """The document whose image names are replaced by the images' bytes."""
    return Document(
        key, kind, tuple(ImagePart(part, images[part]) if isinstance(part, str) else part for part in parts)
    )


def prompt(turns: Sequence[Turn], images: Sequence[bytes], tokenizer: Tokenizer, key: str = "prompt") -> Document:
    """The document that a model continues with the answer to the last of `turns`, a user's.

    Its ids are the first ids of the training document of the same conversation. `images` fill the `<image>` marks in
    order; DataError if their numbers differ or the turns do not alternate.
    """
    roles = [turn.role for turn in turns]
    if roles != [("user", "assistant")[number % 2] for number in range(len(turns))] or len(turns) % 2 == 0:
        raise DataError(
            f"{key}: turns are {', '.join(roles) or 'missing'}; a prompt alternates and ends with a user's turn"
        )
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise DataError(f"{key}: {marks} {IMAGE_MARK} in the turns but {len(images)} images; give one for each")
    names = {str(number): data for number, data in enumerate(images)}
    content = Content("conversation", images=tuple(names), turns=tuple(turns))
    parts = encode_outlines([outline(content, tokenizer)], tokenizer)[0]
    return document_of(key, "conversation", parts, names)
