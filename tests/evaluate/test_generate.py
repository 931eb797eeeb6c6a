"""Prompts, and batched generation with a cache against one at a time without."""

from dataclasses import replace
from itertools import combinations, takewhile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmtrain.config.errors import DataError
from mmtrain.data.batch import batch_documents
from mmtrain.data.chat import Turn
from mmtrain.data.documents import Content, encode_outlines, outline
from mmtrain.data.record import Batch, Document, ImagePart
from mmtrain.evaluate.generate import generate
from mmtrain.evaluate.prompts import BLANK, Prompter, last_positions, neighbours, share_images
from mmtrain.model.attention import KVCache
from mmtrain.model.stepio import first_inputs
from tests.data.inputs import tokenizer
from tests.evaluate import checkpoints

RECIPE = checkpoints.recipe()
MODEL = checkpoints.random_model(RECIPE)
INPUTS = first_inputs(RECIPE.model)
LAYERS = RECIPE.model.decoder.num_layers
NEW_TOKENS = 9
QUESTIONS = [
    ("What is the colour of the shape?", "red.png"),
    ("Why?", "green.png"),
    ("Is there a red circle above the blue square, and is it raining beside the river?", "red.png"),
    ("Is fire cold?", None),
    ("Colour?", "red.png"),
]


@torch.no_grad()
def forward(batch: Batch, at: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
    return MODEL(batch, INPUTS, at, cache)


@pytest.fixture
def prompter(tmp_path: Path) -> Prompter:
    return Prompter(RECIPE, tokenizer(), checkpoints.pictures(tmp_path / "images"))


def documents(prompter: Prompter) -> list[Document]:
    return [prompter.question(text, image) for text, image in QUESTIONS]


def slow(document: Document, ends: frozenset[int]) -> list[int]:
    """One prompt, the whole of it read anew for every token, no cache, no sharing."""
    out: list[int] = []
    while len(out) < NEW_TOKENS:
        batch = batch_documents([document], RECIPE, tokenizer())
        chosen = int(forward(batch, torch.tensor([batch.tokens.numel() - 1]), None).argmax())
        if chosen in ends:
            break
        out.append(chosen)
        last = document.parts[-1]
        ids = torch.tensor([*last.token_ids, chosen], dtype=torch.int32).numpy()
        mask = torch.zeros(len(ids), dtype=torch.bool).numpy()
        document = replace(document, parts=(*document.parts[:-1], replace(last, token_ids=ids, supervised=mask)))
    return out


def test_batched_generation_with_a_cache_equals_one_prompt_at_a_time_without(prompter: Prompter) -> None:
    free = [slow(document, frozenset()) for document in documents(prompter)]
    assert len({tuple(row) for row in free}) == len(QUESTIONS), "the answers must differ for this to say anything"
    batch = prompter.batch(documents(prompter))
    assert generate(forward, batch, LAYERS, frozenset(), NEW_TOKENS) == free

    def cut(row: list[int], ends: frozenset[int]) -> list[int]:
        return list(takewhile(lambda token: token not in ends, row))

    # End tokens that the rows meet at as many different times as possible.
    pairs = map(frozenset, combinations({token for row in free for token in row}, 2))
    ends = max(pairs, key=lambda pair: len({len(cut(row, pair)) for row in free}))
    wanted = [slow(document, ends) for document in documents(prompter)]
    assert wanted == [cut(row, ends) for row in free] and len({len(row) for row in wanted}) > 2
    assert generate(forward, batch, LAYERS, ends, NEW_TOKENS) == wanted


def test_padding_on_the_left_makes_no_difference(prompter: Prompter) -> None:
    right = prompter.batch(documents(prompter))
    rows, width = right.tokens.shape
    shift = width - (right.document_ids >= 0).sum(1)
    source = (torch.arange(width) - shift.unsqueeze(1)) % width
    moved = {
        name: getattr(right, name).gather(1, source)
        for name in ("tokens", "labels", "weights", "document_ids", "positions", "kind", "source_ids")
    }
    slots = torch.where(right.image_slots >= 0, right.image_slots + shift[right.image_slots // width], -1)
    left = replace(right, **moved, image_slots=slots)
    assert last_positions(left).tolist() == [width - 1 + row * width for row in range(rows)]
    assert generate(forward, left, LAYERS, (), NEW_TOKENS) == generate(forward, right, LAYERS, (), NEW_TOKENS)


def test_generation_stops_when_every_row_is_done(prompter: Prompter) -> None:
    batch = prompter.batch(documents(prompter))
    first = {row[0] for row in generate(forward, batch, LAYERS, (), 1)}
    calls: list[torch.Size] = []

    def counted(batch: Batch, at: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        calls.append(batch.tokens.shape)
        return forward(batch, at, cache)

    assert generate(counted, batch, LAYERS, first, 50) == [[]] * len(QUESTIONS)
    assert calls == [batch.tokens.shape]


@pytest.mark.parametrize("template", ["plain", "chatml", "vicuna"])
def test_a_prompt_is_the_beginning_of_the_training_document(prompter: Prompter, template: str) -> None:
    chosen = tokenizer(template)
    prompter = replace(prompter, tokenizer=chosen)
    turns = (Turn("user", "<image>\nWhat colour?"), Turn("assistant", "red"))
    trained = encode_outlines([outline(Content("conversation", images=("0",), turns=turns), chosen)], chosen)[0]
    ids = [token for part in trained for token in ([-1] if isinstance(part, str) else part.token_ids.tolist())]
    asked = prompter.question("What colour?", "red.png")
    start = [t for part in asked.parts for t in ([-1] if isinstance(part, ImagePart) else part.token_ids.tolist())]
    assert ids[: len(start)] == start
    assert ids[len(start)] == prompter.answer_token("red")
    assert ids[-1] in chosen.end_ids() and not chosen.end_ids() & set(ids[len(start) : -1])


def test_a_shared_picture_runs_once_and_gives_the_same_logits(prompter: Prompter) -> None:
    apart = batch_documents(documents(prompter), RECIPE, tokenizer())
    together = share_images(apart)
    assert (apart.images.shape[0], together.images.shape[0]) == (4, 2)
    assert together.image_slots.shape == (2, 3 * apart.image_slots.shape[1])
    at = last_positions(apart)
    torch.testing.assert_close(forward(together, at, None), forward(apart, at, None), rtol=1e-5, atol=1e-5)


def test_blank_pictures_change_answers_but_not_those_of_text(prompter: Prompter) -> None:
    blank = replace(prompter, blank=True)
    seen, unseen = prompter.batch(documents(prompter)), blank.batch(documents(prompter))
    assert unseen.images.shape[0] == 1 and unseen.images[0, :, 3, 5].tolist() == list(BLANK)
    at = last_positions(seen)
    difference = (forward(seen, at, None) - forward(unseen, at, None)).abs().amax(1)
    about_none = [image is None for _, image in QUESTIONS]
    assert (difference[torch.tensor(about_none)] < 1e-5).all()
    assert (difference[~torch.tensor(about_none)] > 1e-2).all()
    text = [prompter.question("Is fire cold?", None)]
    one, other = prompter.batch(text), blank.batch(text)
    assert torch.equal(forward(one, last_positions(one), None), forward(other, last_positions(other), None))


def test_a_caption_is_the_training_document_and_its_image_the_prompt(prompter: Prompter) -> None:
    document = prompter.caption("It is red.", "red.png")
    batch = prompter.batch([document])
    at = batch.weights.flatten().nonzero().squeeze(1)
    labels = batch.labels.flatten()[at]
    assert tokenizer().decode(labels[:-1].tolist()) == "It is red." and int(labels[-1]) == tokenizer().eos_id
    # The image alone predicts the first token.
    prompt = prompter.batch([replace(document, parts=document.parts[:1])])
    alone, whole = forward(prompt, last_positions(prompt), None), forward(batch, at[:1], None)
    torch.testing.assert_close(F.log_softmax(alone, -1), F.log_softmax(whole, -1), rtol=1e-4, atol=1e-4)


def test_neighbours_share_pictures_and_short_ones_come_first() -> None:
    items = [("a", 5), ("b", 1), ("a", 2), (None, 9), ("b", 3)]
    order = neighbours(len(items), lambda i: items[i][0], lambda i: items[i][1])
    assert order == [1, 4, 2, 0, 3]


def test_an_unreadable_picture_names_the_items(prompter: Prompter) -> None:
    (prompter.images / "red.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a picture of items q7 to q7: unreadable image"):
        prompter.batch([prompter.question("Why?", "red.png", "q7")])
    with pytest.raises(DataError, match=r"red.png: unreadable image: .*; replace the picture or leave it out"):
        prompter.check(["green.png", "red.png"])
    with pytest.raises(DataError, match=r"image .*gone.png cannot be read: No such file"):
        prompter.question("Why?", "gone.png")
