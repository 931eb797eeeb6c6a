"""Questions, and captions, as batches that continue exactly as training documents do."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from mmtrain.config.errors import DataError
from mmtrain.config.schema import Recipe
from mmtrain.data.batch import batch_documents, canvas_of
from mmtrain.data.chat import IMAGE_MARK, Turn
from mmtrain.data.documents import BadSample, Content, document_of, encode_outlines, outline, prompt
from mmtrain.data.image import PAD_COLOUR, decode_image
from mmtrain.data.record import Batch, Document
from mmtrain.data.tokenizer import Tokenizer

BLANK = PAD_COLOUR
"""Colour (red, green, blue) of a blanked picture: CLIP's mean, a grey that normalisation turns into (nearly) zero."""


@dataclass(frozen=True)
class Prompter:
    """Makes documents and batches for one checkpoint's recipe and tokenizer."""

    recipe: Recipe
    tokenizer: Tokenizer
    images: Path = Path()
    """Folder that image names are relative to."""
    blank: bool = False
    """Whether every picture is replaced by one of the colour BLANK."""

    def question(self, text: str, image: str | None, key: str = "question") -> Document:
        """A user's first turn, about one image or none, up to where the answer begins."""
        mark = "" if image is None else f"{IMAGE_MARK}\n"
        return prompt([Turn("user", mark + text)], self._files(image), self.tokenizer, key)

    def caption(self, text: str, image: str, key: str = "caption") -> Document:
        """An image and its caption, as in training; its first part alone is the prompt of a caption."""
        content = Content("caption", texts=(None, text), images=("0", None))
        parts = encode_outlines([outline(content, self.tokenizer)], self.tokenizer)[0]
        return document_of(key, "caption", parts, {"0": self._files(image)[0]})

    def batch(self, documents: Sequence[Document]) -> Batch:
        """One document a row, padded on the right; equal pictures are in it once. DataError: an unreadable picture."""
        try:
            batch = batch_documents(documents, self.recipe, self.tokenizer)
        except BadSample as error:
            names = [document.key for document in documents]
            raise DataError(f"{self.images}: a picture of items {names[0]} to {names[-1]}: {error}") from None
        if self.blank:
            batch = replace(batch, images=blanked(batch.images))
        return share_images(batch)

    def check(self, names: Sequence[str]) -> None:
        """Decode each of these pictures once; DataError names the first that cannot be."""
        for name in dict.fromkeys(names):
            try:
                decode_image(self._files(name)[0], canvas_of(self.recipe))
            except BadSample as error:
                raise DataError(f"{self.images / name}: {error}; replace the picture or leave it out") from None

    def answer_token(self, answer: str) -> int:
        """First token of `answer` where the chat template puts it."""
        return self.tokenizer.encode(self.tokenizer.template.before_answer + answer)[0]

    @cached_property
    def image_tokens(self) -> int:
        """Tokens that an image becomes at most: its own and those of its crops."""
        return (1 + self.recipe.data.sub_images) * self.recipe.model.connector.num_tokens

    def _files(self, image: str | None) -> list[bytes]:
        """Content of the image file, in a list of one; no image, empty list."""
        try:
            return [] if image is None else [(self.images / image).read_bytes()]
        except OSError as error:
            raise DataError(f"image {self.images / image} cannot be read: {error.strerror}") from None


def blanked(images: torch.Tensor) -> torch.Tensor:
    """images [N, 3, H, W] uint8 -> as many, all of the colour BLANK."""
    return torch.tensor(BLANK, dtype=torch.uint8).view(1, 3, 1, 1).expand_as(images).contiguous()


def share_images(batch: Batch) -> Batch:
    """The same batch with equal images once, so that the vision tower sees each once.

    An image's slots [M] in each of its places follow each other: image_slots [N, places * M], -1 beyond the last.
    """
    places: dict[bytes, list[int]] = {}
    for number, image in enumerate(batch.images):
        places.setdefault(image.numpy().tobytes(), []).append(number)
    most = max(map(len, places.values()))
    groups = list(places.values())
    slots = torch.full((len(groups), most, batch.image_slots.shape[1]), -1)
    for row, group in enumerate(groups):
        slots[row, : len(group)] = batch.image_slots[group]
    first = [group[0] for group in groups]
    return replace(
        batch, images=batch.images[first], image_valid=batch.image_valid[first], image_slots=slots.flatten(1)
    )


def last_positions(batch: Batch) -> torch.Tensor:
    """[B] flat index of each row's last token, whichever side is padded: where the answer's first is predicted."""
    rows, width = batch.tokens.shape
    place = torch.where(batch.document_ids >= 0, torch.arange(width), 0)
    return torch.arange(rows) * width + place.amax(1)


def neighbours(count: int, image: Callable[[int], Hashable], length: Callable[[int], int]) -> list[int]:
    """Order in which to ask items 0 .. count - 1: those of one image together, short ones before long ones."""
    longest: dict[Hashable, int] = {}
    for item in range(count):
        longest[image(item)] = max(longest.get(image(item), 0), length(item))
    first = {name: place for place, name in enumerate(longest)}
    return sorted(range(count), key=lambda item: (longest[image(item)], first[image(item)], length(item)))
