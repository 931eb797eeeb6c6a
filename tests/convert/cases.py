"""What the tests of conversion share without transformers: import through the tool, batches of ids, greedy text."""

from pathlib import Path

import torch

from mmtrain.config.tokens import TokenKind
from mmtrain.data.record import Batch
from mmtrain.evaluate.generate import CachedForward, generate
from tools.convert import main

SMALL = [
    "model.vision.image_size=[28,28]",
    "model.vision.patch_size=7",
    "model.vision.hidden_size=24",
    "model.vision.num_layers=3",
    "model.vision.num_heads=2",
    "model.vision.intermediate_size=40",
    "model.connector.kind=mlp",
    "model.connector.num_tokens=16",
]
"""A fresh tower and connector beside a pretrained decoder."""


def convert(monkeypatch, *arguments: object) -> int:
    """python -m tools.convert ARGUMENTS."""
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    return main()


def import_decoder(monkeypatch, folder: Path, out: Path, *overrides: str) -> Path:
    """A checkpoint whose decoder is that of `folder`."""
    assert convert(monkeypatch, "hf-to-mm", *SMALL, *overrides, "--decoder", folder, "--out", out) == 0
    return out


def text_batch(ids: torch.Tensor) -> Batch:
    """ids [B, T], a document a row, no images."""
    rows, length = ids.shape
    return Batch(
        tokens=ids,
        labels=torch.zeros_like(ids),
        weights=torch.zeros(ids.shape),
        document_ids=torch.zeros_like(ids),
        positions=torch.arange(length).expand(rows, -1).contiguous(),
        kind=torch.full(ids.shape, int(TokenKind.TEXT), dtype=torch.uint8),
        source_ids=torch.zeros_like(ids),
        images=torch.zeros(0, 3, 28, 28, dtype=torch.uint8),
        image_valid=torch.zeros(0, dtype=torch.bool),
        image_slots=torch.zeros(0, 16, dtype=torch.int64),
        keys=[["row"]] * rows,
        num_sources=1,
    )


def image_batch(ids: torch.Tensor, images: torch.Tensor, image_id: int, per_image: int = 16) -> Batch:
    """ids [1, T] with runs of image_id, `per_image` for each of images [N, 3, H, W] uint8."""
    batch = text_batch(ids)
    at = (ids[0] == image_id).nonzero().view(len(images), per_image)
    batch.kind[ids == image_id] = int(TokenKind.IMAGE)
    values = {"images": images, "image_valid": torch.ones(len(images), dtype=torch.bool), "image_slots": at}
    return Batch(**{**vars(batch), **values})


def all_logits(forward: CachedForward, batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of every position."""
    return forward(batch, torch.arange(batch.tokens.numel()), None).view(*batch.tokens.shape, -1)


def greedy(forward: CachedForward, batch: Batch, layers: int, count: int) -> list[list[int]]:
    """Our greedy continuation of each row; nothing ends it."""
    return generate(forward, batch, layers, (), count)
