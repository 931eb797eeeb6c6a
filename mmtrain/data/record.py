"""The records that pass between the parts of the data stream, from a tar's index to a batch on the device.

Order of life: `Index` (a shard without opening it) -> planner -> `Document` (a sample, decoded) -> `Batch` -> `Step`.
"""

from __future__ import annotations  # decoding processes import this module and never torch, which takes seconds

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mmtrain.config.tokens import TokenKind

if TYPE_CHECKING:
    import torch

DocumentKind = Literal["caption", "interleaved", "text", "conversation"]


class Segment(NamedTuple):
    """One stretch of a document that a cut never divides, known without opening the sample.

    Texts have `tokens` and `supervised`; images have `width` and `height` (how many tokens an image becomes is the
    recipe's choice, so the index cannot say). A document may be cut before any segment. A segment of a conversation
    ends with an answer, so that a cut never parts a question from its answer.
    """

    kind: TokenKind
    """TEXT or IMAGE."""
    tokens: int = 0
    """Text: tokens, with everything that the document format or chat template adds (end tokens, labels). Image: 0."""
    supervised: int = 0
    """Text: tokens that are targets of the loss. Never counts a document's very first token, which nothing predicts."""
    width: int = 0
    """Image: pixels, from the file's header (as stored: EXIF rotation is not applied)."""
    height: int = 0
    """Image: pixels."""

    @property
    def is_image(self) -> bool:
        """Whether this segment is an image."""
        return self.kind == TokenKind.IMAGE


class Member(NamedTuple):
    """One file of a sample inside its tar."""

    suffix: str
    """What follows `KEY.` in the member's name: json, jpg, 0.jpg, txt."""
    offset: int
    """First byte of the content in the tar."""
    size: int
    """Bytes of the content."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One sample of a shard."""

    key: str
    """Name of the sample: unique in its shard."""
    offset: int
    """First byte of the sample's run of members in the tar, headers included."""
    size: int
    """Bytes of that run: one read fetches the sample."""
    kind: DocumentKind
    """How its members become tokens."""
    members: tuple[Member, ...]
    """Its files, in tar order."""
    segments: tuple[Segment, ...]
    """What it becomes, in document order; one part of the decoded `Document` each. Empty if unusable."""
    unusable: str = ""
    """Why the sample cannot be read (seen when indexing); such an entry goes to the ledger and is never packed."""

    @property
    def tokens(self) -> int:
        """Text tokens (image tokens depend on the recipe)."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def supervised(self) -> int:
        """Targets of the loss."""
        return sum(segment.supervised for segment in self.segments)

    @property
    def images(self) -> int:
        """Images (not sub-images, which depend on the recipe)."""
        return sum(segment.is_image for segment in self.segments)


@dataclass(frozen=True)
class IndexHeader:
    """First line of an index: all that is needed to count a source without reading its entries."""

    version: int
    """Format of the index file."""
    tokenizer_hash: str
    """`Tokenizer.hash` that the token counts hold for."""
    shard: str
    """File name of the tar beside the index, or the address of a remote one (http, s3, `pipe:`)."""
    shard_bytes: int
    """Its size when indexed."""
    members_sha256: str
    """Hash of all keys, offsets, sizes and members: changes when the tar was written anew."""
    samples: int
    """Entries, unusable ones included."""
    unusable: int
    """Entries that cannot be read."""
    images: int
    """Images in usable entries."""
    tokens: int
    """Text tokens in usable entries."""
    supervised: int
    """Targets of the loss in usable entries."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text part of a decoded document."""

    token_ids: np.ndarray
    """[n] int32."""
    supervised: np.ndarray
    """[n] bool: whether the token is a target of the loss."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Image part of a decoded document: bytes as stored in the tar, pixels are made later."""

    suffix: str
    """Member that it came from."""
    data: bytes
    """The image file."""


@dataclass(frozen=True, slots=True)
class Document:
    """One sample as token ids and image bytes; `parts[i]` is what the index calls `segments[i]`."""

    key: str
    """Name of the sample."""
    kind: DocumentKind
    """Where its loss mask came from."""
    parts: tuple[Text | ImagePart, ...]
    """Texts and images in document order."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B packs of T positions, with its N >= 1 images (one blank image when there is none)."""

    tokens: torch.Tensor
    """[B, T] int64 token ids; the image placeholder's id where kind is IMAGE, the padding id where it is PADDING."""
    labels: torch.Tensor
    """[B, T] int64, shifted: the token at t + 1 if it is of the same document and a target; 0 where weight is 0."""
    weights: torch.Tensor
    """[B, T] fp32 weight of each label's loss; 0 without label."""
    document_ids: torch.Tensor
    """[B, T] int64 number of the document within its pack; -1 for padding. Attention never crosses it."""
    positions: torch.Tensor
    """[B, T] int64 position within the document, from 0."""
    kind: torch.Tensor
    """[B, T] uint8 TokenKind."""
    source_ids: torch.Tensor
    """[B, T] int64 number of the document's source in the recipe's order; 0 for padding."""
    images: torch.Tensor
    """[N, 3, H, W] uint8 on the recipe's canvas."""
    image_valid: torch.Tensor
    """[N] bool; False for a blank image that only keeps the towers running."""
    image_slots: torch.Tensor
    """[N, M] int64 flat positions in B * T that the image's M features go to; -1 for an invalid image.

    [N, K * M] where an image may stand in up to K places (prompts that share it); -1 where it stands in fewer.
    """
    keys: list[list[str]]
    """Sample keys of each pack, in document order."""
    num_sources: int
    """Sources of the recipe: length of the sums by source."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in self.tensors().items()})

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU reads by itself."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        return {name: value for name, value in vars(self).items() if hasattr(value, "device")}


@dataclass(frozen=True)
class Step:
    """One optimizer step of one data-parallel rank. Sums are of this rank's packs alone; the loop adds the ranks up."""

    micro_batches: list[Batch]
    """As many on every rank."""
    label_weight: float
    """Sum of all label weights."""
    valid_tokens: dict[str, float]
    """Part (vision, connector, decoder) -> tokens that its routers see, blanks and padding excluded."""
    cursor: dict[str, Any]
    """State of the plan after this step, as JSON; the same on every rank."""
    served: dict[str, int]
    """Source -> tokens planned so far over all ranks, image tokens included."""
    ledger: list[dict[str, Any]] = field(default_factory=list)
    """Samples of this step that were not used: source, shard, key, reason, and the tokens that are padding for them."""
    pack_keys: list[list[str]] = field(default_factory=list)
    """Sample keys of every pack of this rank, in order."""
    samples: int = 0
    """Samples that were read, or could not be; a cut document counts in each of its packs."""
    bad: list[dict[str, Any]] = field(default_factory=list)
    """The lines of the ledger of samples that could not be used, without those that the recipe withholds."""
