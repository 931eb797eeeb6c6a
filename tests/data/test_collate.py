from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config.schema import LossWeights
from mmtrain.config.tokens import TokenKind
from mmtrain.data.batch import batch_documents, stack
from mmtrain.data.collate import EVEN, Laid, PackArrays, Shape, Slot, collate_pack, lay_out
from mmtrain.data.image import Canvas
from mmtrain.data.pack import Cut, cut_document
from mmtrain.data.record import Document, ImagePart, Text
from tests.data.inputs import picture, tokenizer
from tests.tiny import recipe

M, T, IMAGE_ID, PAD_ID = 4, 40, 3, 7
SHAPE = Shape(Canvas(4, 6), M, T)


def words(*ids: int, learnt: bool = True) -> Text:
    return Text(np.array(ids, np.int32), np.full(len(ids), learnt))


def document(*parts: Text | ImagePart, key: str = "d") -> Document:
    return Document(key, "interleaved", parts)


def room(*parts: Text | ImagePart) -> np.ndarray:
    """Enough for the images of a document."""
    return np.zeros((sum(isinstance(part, ImagePart) for part in parts), 3, 4, 6), np.uint8)


class Placed(NamedTuple):
    """What stands at one place of a pack, and its pixels."""

    slot: Slot
    pixels: np.ndarray


def placed(*parts: Text | ImagePart, key: str = "d", source: int = 0) -> Placed:
    pixels = room(*parts)
    laid = lay_out(document(*parts), None, SHAPE, pixels)
    return Placed(Slot(key, source, laid.length, laid), pixels)


def collate(items: Sequence[Placed], weights: LossWeights = EVEN) -> PackArrays:
    """A pack in memory that held another one before."""
    good = np.concatenate([room(), *(item.pixels for item in items if item.slot.laid)])
    panels = len(good) + 2  # a bad sample's places are left over
    arrays = PackArrays.within(np.full(PackArrays.nbytes(SHAPE, panels), 171, np.uint8), SHAPE, panels)
    arrays.panels[: len(good)] = good
    return collate_pack([item.slot for item in items], arrays, SHAPE, IMAGE_ID, PAD_ID, weights)


def image(colour: int) -> ImagePart:
    return ImagePart("png", picture(6, 4, "PNG", (colour, colour, colour)))


PARTS = st.lists(
    st.one_of(
        st.integers(0, 255).map(image),
        st.lists(st.tuples(st.integers(10, 99), st.booleans()), min_size=1, max_size=6).map(
            lambda rows: Text(np.array([r[0] for r in rows], np.int32), np.array([r[1] for r in rows]))
        ),
    ),
    min_size=1,
    max_size=3,
)


def slow_twin(rows: list[tuple[int, list[tuple[int, bool, int]] | int]]) -> dict[str, list[float]]:
    """The pack, one position at a time: rows of (source, [(token, learnt, kind)] or a length that is bad)."""
    out: dict[str, list[float]] = {name: [] for name in ("tokens", "labels", "weights", "ids", "at", "kind", "source")}
    for number, (source, tokens) in enumerate(rows):
        if isinstance(tokens, int):
            cells = [(PAD_ID, 0, 0, -1, 0, TokenKind.PADDING, 0)] * tokens
        else:
            cells = []
            for at, (token, _, kind) in enumerate(tokens):
                following = tokens[at + 1] if at + 1 < len(tokens) else (0, False, 0)
                label = following[0] if following[1] else 0
                cells.append((token, label, int(following[1]), number, at, kind, source))
        for cell in cells:
            for name, value in zip(out, cell, strict=True):
                out[name].append(value)
    rest = T - len(out["tokens"])
    for name, value in zip(out, (PAD_ID, 0, 0, -1, 0, TokenKind.PADDING, 0), strict=True):
        out[name] += [value] * rest
    return out


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PARTS, st.integers(0, 2), st.booleans()), max_size=3))
def test_a_pack_equals_its_slow_twin(drawn: list[tuple[list[Text | ImagePart], int, bool]]) -> None:
    items, rows, left = [], [], T
    for parts, source, bad in drawn:
        cells: list[tuple[int, bool, int]] = []
        for part in parts:
            if isinstance(part, ImagePart):
                cells += [(IMAGE_ID, False, TokenKind.IMAGE)] * M
            else:
                cells += [
                    (int(i), bool(s), TokenKind.TEXT) for i, s in zip(part.token_ids, part.supervised, strict=True)
                ]
        if len(cells) > left:
            continue
        left -= len(cells)
        made = placed(*parts, source=source)
        items.append(made._replace(slot=made.slot._replace(laid=None)) if bad else made)
        rows.append((source, len(cells) if bad else cells))
    pack = collate(items)
    names = ("tokens", "labels", "weights", "document_ids", "positions", "kind", "source_ids")
    for name, expected in zip(names, slow_twin(rows).values(), strict=True):
        assert getattr(pack, name).tolist() == expected, name
    assert len(pack.starts) == len(pack.panels)


def test_labels_end_with_their_document() -> None:
    pack = collate([placed(words(11, 12, 13)), placed(words(21, 22))])
    assert pack.labels[:6].tolist() == [12, 13, 0, 22, 0, 0]
    assert pack.weights[:6].tolist() == [1, 1, 0, 1, 0, 0]
    assert pack.positions[:6].tolist() == [0, 1, 2, 0, 1, 0]
    assert pack.document_ids[:6].tolist() == [0, 0, 0, 1, 1, -1]


def test_targets_count_by_whether_an_image_stands_before_them_in_their_document() -> None:
    mixed, captioned, plain = (
        placed(words(11, 12), image(9), words(13, 14)),
        placed(image(9), words(21)),
        placed(words(31, 32)),
    )
    weights = LossWeights(after_image=0.5, text_only=2.0)
    pack = collate([mixed, captioned, plain], weights)
    gap = [0.0] * (M - 1)
    expected = [2.0, 0.0, *gap, 0.5, 0.5, 0.0, *gap, 0.5, 0.0, 2.0, 0.0]
    assert pack.weights[: len(expected)].tolist() == expected and not pack.weights[len(expected) :].any()
    even = collate([mixed, captioned, plain])
    assert ((even.weights > 0) == (pack.weights > 0)).all() and (even.labels == pack.labels).all()


def test_a_target_that_counts_nothing_is_no_label() -> None:
    items = [placed(image(9), words(21)), placed(words(31, 32))]
    pack = collate(items, LossWeights(text_only=0.0))
    assert pack.weights.sum() == 1 and pack.labels[pack.weights > 0].tolist() == [21]
    assert not pack.labels[pack.weights == 0].any()


def test_a_document_without_targets_is_fine() -> None:
    pack = collate([placed(image(9), words(11, 12, learnt=False))])
    assert pack.weights.sum() == 0 and (pack.kind != TokenKind.PADDING).sum() == M + 2


def test_the_stretches_of_a_cut_document_lie_end_to_end() -> None:
    parts = (words(*range(10, 30)), image(50), words(*range(30, 80)), image(90), words(99))
    pixels = room(*parts)
    whole = lay_out(document(*parts), None, SHAPE, pixels)
    sizes = [(M, 1) if isinstance(part, ImagePart) else (len(part.token_ids), 0) for part in parts]
    cuts = cut_document(sizes, 24, 1)
    assert len(cuts) > 3
    rooms = [room(*parts[cut.first : cut.last + 1]) for cut in cuts]
    pieces: list[Laid] = [lay_out(document(*parts), cut, SHAPE, into) for cut, into in zip(cuts, rooms, strict=True)]
    assert [piece.length for piece in pieces] == [cut.tokens for cut in cuts]
    assert [len(piece.images) for piece in pieces] == [cut.panels for cut in cuts] == list(map(len, rooms))
    assert np.array_equal(np.concatenate(rooms), pixels)
    begins = [0, *accumulate(piece.length for piece in pieces)]
    for number in (1, 2):  # token ids, and which are targets
        joined = [text[number] for piece in pieces for text in piece.texts]
        assert np.array_equal(np.concatenate(joined), np.concatenate([text[number] for text in whole.texts]))
    assert whole.images == [begin + at for begin, piece in zip(begins, pieces, strict=False) for at in piece.images]


def test_a_stretch_inside_one_text() -> None:
    laid = lay_out(document(words(*range(10, 30))), Cut(0, 3, 0, 7, 4, 0), SHAPE, room())
    ((start, ids, supervised),) = laid.texts
    assert (laid.length, start, ids.tolist(), supervised.all()) == (4, 0, [13, 14, 15, 16], True)


def packs() -> list[PackArrays]:
    first = [placed(image(10), words(11, 12), image(20), image(30)), placed(words(13))]
    second = [placed(words(14), image(40), words(15), key="e", source=1)]
    return [collate(items) for items in (first, second, [])]


def test_image_slots_are_the_placeholders_of_each_image_in_order() -> None:
    batch = stack(packs(), SHAPE, num_sources=2)
    flat = batch.kind.flatten()
    assert batch.images[:, 0, 0, 0].tolist() == [10, 20, 30, 40]
    assert batch.image_slots.shape == (4, M) and batch.image_valid.all()
    assert batch.image_slots.flatten().tolist() == (flat == TokenKind.IMAGE).nonzero().flatten().tolist()
    assert (batch.tokens.flatten()[batch.image_slots] == IMAGE_ID).all()
    assert batch.image_slots[3].tolist() == [T + 1, T + 2, T + 3, T + 4]
    assert batch.keys == [["d", "d"], ["e"], []] and batch.num_sources == 2


def test_a_batch_without_images_has_one_blank() -> None:
    batch = stack(packs()[2:], SHAPE, num_sources=2)
    assert batch.images.shape == (1, 3, 4, 6) and not batch.images.any()
    assert batch.image_valid.tolist() == [False] and (batch.image_slots == -1).all()
    assert (batch.document_ids == -1).all() and not batch.weights.any()


def test_dtypes_are_those_of_the_record() -> None:
    batch = stack(packs(), SHAPE, num_sources=2)
    long = (batch.tokens, batch.labels, batch.document_ids, batch.positions, batch.source_ids, batch.image_slots)
    assert {tensor.dtype for tensor in long} == {torch.int64}
    assert (batch.weights.dtype, batch.kind.dtype, batch.images.dtype) == (torch.float32, torch.uint8, torch.uint8)


def test_documents_become_a_batch_of_rows_without_a_plan() -> None:
    made, tok = recipe(), tokenizer()
    batch = batch_documents([document(words(*range(50, 90))), document(image(5), words(60), key="e")], made, tok)
    assert batch.tokens.shape == (2, 40)
    assert batch.tokens[1, :4].tolist() == [tok.image_id] * 4 and batch.tokens[1, 5:].unique().tolist() == [tok.pad_id]
    assert batch.images.shape == (1, 3, *made.model.vision.image_size) and batch.keys == [["d"], ["e"]]
