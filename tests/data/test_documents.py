import json
from typing import Any

import numpy as np
import pytest

from mmtrain.config.errors import DataError
from mmtrain.config.tokens import TokenKind
from mmtrain.data.documents import (
    MAX_JSON_BYTES,
    BadSample,
    Content,
    content_defect,
    content_of,
    encode_outlines,
    outline,
    segments_of,
)
from mmtrain.data.record import Document, ImagePart, IndexEntry, Segment, Text
from tests.data.inputs import decode_document, picture, tokenizer

PNG = picture()


def members(fields: dict[str, Any], **images: bytes) -> dict[str, bytes]:
    """A sample's files; keyword `i0_png` is the member 0.png."""
    return {"json": json.dumps(fields).encode()} | {name.lstrip("i").replace("_", "."): d for name, d in images.items()}


def decoded(files: dict[str, bytes]) -> Document:
    """Index the files and decode them by that index."""
    content = content_of(files)
    parts = encode_outlines([outline(content, tokenizer())], tokenizer())[0]
    segments = segments_of(parts, dict.fromkeys(content.image_names(), (8, 6)))
    return decode_document(IndexEntry("k", 0, 0, content.kind, (), segments), files, tokenizer(), "s.tar")


def shown(document: Document) -> list[str | bytes]:
    """Parts as text with special tokens, and image bytes."""
    decode = tokenizer().decode
    return [p.data if isinstance(p, ImagePart) else decode(p.token_ids, skip_special=False) for p in document.parts]


BOOK = {"kind": "interleaved", "texts": ["T", None, "a", "b", None], "images": [None, "0.png", None, None, "1.png"]}


def test_caption_is_image_text_end() -> None:
    document = decoded(members({"kind": "caption", "texts": [None, "A bar."], "images": ["png", None]}, png=PNG))
    assert shown(document) == [PNG, "A bar.<eos>"]
    assert document.parts[1].supervised.all()
    assert document.parts[1].token_ids.dtype == np.int32


def test_interleaved_keeps_the_order_of_the_document() -> None:
    document = decoded(members(BOOK, i0_png=PNG, i1_png=b"other"))
    assert shown(document) == ["T", PNG, "a", "\n\nb", b"other", "<eos>"]
    masks = [part.supervised.tolist() for part in document.parts if isinstance(part, Text)]
    assert masks[0] == [False] and all(all(mask) for mask in masks[1:])  # nothing predicts the first token


def test_text_is_text_and_end() -> None:
    document = decoded(members({"kind": "text", "texts": ["Once <eos> upon"], "images": [None]}))
    assert shown(document) == ["Once <eos> upon<eos>"]
    assert (document.parts[0].token_ids == tokenizer().eos_id).sum() == 1  # what a text spells is no end
    assert document.parts[0].supervised.tolist() == [False] + [True] * (len(document.parts[0].token_ids) - 1)


def test_conversation_of_our_own_layout() -> None:
    turns = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "red"}]
    document = decoded(members({"kind": "conversation", "turns": turns, "images": ["png"]}, png=PNG))
    assert shown(document) == [PNG, "Question: What?\nAnswer: red<eos>"]


@pytest.mark.parametrize("metadata", [None, b'{"url": "http://x", "status": "success", "caption": "unread"}'])
def test_img2dataset_sample_is_a_caption(metadata: bytes | None) -> None:
    files = {"jpg": PNG, "txt": "Ein Häuschen\n".encode()} | ({"json": metadata} if metadata else {})
    assert shown(decoded(files)) == [PNG, "Ein Häuschen<eos>"]


def test_caption_may_stand_in_the_json_alone() -> None:
    assert shown(decoded({"webp": PNG, "json": b'{"caption": "hi"}'})) == [PNG, "hi<eos>"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"json": b'{"kind": '}, "broken JSON: Expecting value"),
        ({"json": b"\xff\xfe"}, "broken JSON"),
        ({"json": b"[1]"}, "JSON is not an object"),
        (members({"kind": "movie"}), "unknown kind 'movie'"),
        (members({"kind": "text", "texts": ["a"]}), "JSON of kind text lacks or garbles a field: KeyError"),
        (members({"kind": "conversation", "turns": [3], "images": []}), "of kind conversation lacks or garbles"),
        (members({"kind": "caption", "texts": [None, "a"], "images": ["jpg", None]}), "member jpg is missing"),
        (members({"kind": "caption", "texts": [None, " "], "images": ["jpg", None]}, jpg=PNG), "empty caption"),
        ({"txt": b"words"}, "0 images in a sample without a canonical JSON, expected 1"),
        ({"txt": b"words", "jpg": PNG, "png": PNG}, "2 images in a sample"),
        ({"txt": b"\xff", "jpg": PNG}, "caption is not UTF-8"),
        ({"jpg": PNG}, "no caption: neither a .txt member nor `caption` in the JSON"),
        ({"jpg": PNG, "json": b'{"caption": null}'}, "no caption"),
    ],
)
def test_bad_samples_say_why(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        content_of(files)


def test_a_defect_that_the_index_saw_is_a_bad_sample() -> None:
    entry = IndexEntry("k", 0, 0, "text", (), (), unusable="the tar ends early")
    with pytest.raises(BadSample, match="the tar ends early"):
        decode_document(entry, {}, tokenizer(), "s.tar")


def _texts(*counts: int) -> tuple[Segment, ...]:
    return tuple(Segment(TokenKind.TEXT, count, count) for count in counts)


@pytest.mark.parametrize("segments", [_texts(9), (Segment(TokenKind.IMAGE, width=2, height=2),), _texts(3, 3), ()])
def test_tokens_unlike_the_index_stop_the_run(segments: tuple[Segment, ...]) -> None:
    files = members({"kind": "text", "texts": ["zz"], "images": [None]})
    tokens = len(tokenizer().encode("zz")) + 1
    planned = sum(segment.tokens for segment in segments)
    message = (
        f"shard s.tar, sample k: {tokens} text tokens in 1 parts, but its index planned {planned} in {len(segments)}; "
    )
    with pytest.raises(DataError, match=message + "index the folder again with `python -m tools.make_shards wds"):
        decode_document(IndexEntry("k", 0, 0, "text", (), segments), files, tokenizer(), "s.tar")


def test_encoding_together_equals_encoding_apart() -> None:
    contents = [
        content_of(members(BOOK, i0_png=PNG, i1_png=PNG)),
        Content("text", texts=("Some words.",), images=(None,)),
        Content("caption", texts=(None, "A bar."), images=("png", None)),
    ]
    outlines = [outline(content, tokenizer()) for content in contents]
    together = encode_outlines(outlines, tokenizer())
    for item, parts in zip(outlines, together, strict=True):
        apart = encode_outlines([item], tokenizer())[0]
        for one, other in zip(parts, apart, strict=True):
            if isinstance(one, Text):
                assert (one.token_ids == other.token_ids).all() and (one.supervised == other.supervised).all()
            else:
                assert one == other


def test_a_good_document_has_no_defect() -> None:
    assert content_defect(Content("text", texts=("a",), images=(None,))) == ""
    assert content_defect(Content("text")) == "neither texts nor images"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "broken JSON: maximum recursion depth exceeded"),
        ('{"kind": ' + "9" * 10_000 + "}", "broken JSON: Exceeds the limit"),
        (" " * (MAX_JSON_BYTES + 1), f"JSON of {MAX_JSON_BYTES + 1} bytes, more than the {MAX_JSON_BYTES} that are"),
        ('{"kind": "text", "texts": ["a \\ud800"], "images": [null]}', r"text holds half of a character \(\\ud800\)"),
        ('{"kind": "text", "texts": [null], "images": [["x"]]}', r"images holds \"\['x'\]\", not text"),
        (
            '{"kind": "conversation", "turns": [{"role": "user", "text": "<image>"}, '
            '{"role": "assistant", "text": "x"}], "images": [null]}',
            "images holds 'None', not text",
        ),
        ('{"kind": "conversation", "turns": [{"role": [], "text": "x"}], "images": []}', r"turn 0 is from '\[\]', exp"),
    ],
)
def test_hostile_json_is_a_bad_sample(text: str, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        content_of({"json": text.encode()})
