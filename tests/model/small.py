"""Small models, values for their parameters, and micro-batches, for the tests of mmtrain.model."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from mmtrain.config.schema import Connector, Decoder, Model, Moe, Vision
from mmtrain.config.tokens import TokenKind
from mmtrain.model.vlm import VisionLanguageModel

SPARSE = Moe(num_experts=4, top_k=2, balance_coef=0.1, z_coef=0.01)

VISION = Vision(image_size=(28, 21), patch_size=7, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=48)
CONNECTOR = Connector(kind="c_abstractor", num_tokens=4, hidden_size=24, depth=1, num_heads=2)
DECODER = Decoder(
    vocab_size=100,
    hidden_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=56,
)
DENSE = Model(VISION, CONNECTOR, DECODER)
ALL_PARTS = ("vision", "connector", "decoder")


def sparse(model: Model, *parts: str, moe: Moe = SPARSE) -> Model:
    """`model` with experts in the named parts."""
    return replace(model, **{part: replace(getattr(model, part), moe=moe) for part in parts})


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values: matrices normal with fan_in ** -0.5, gains near 1, biases near 0; not constants."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            role = parameter.role
            draw = torch.randn(parameter.shape, generator=generator)
            if role.kind == "vector":
                parameter.copy_(0.1 * draw + (1.0 if role.init == "ones" else 0.0))
            else:
                parameter.copy_(draw * (role.std or role.fan_in**-0.5))
    return module


def built(model: Model, seed: int = 0, checkpoint_activations: bool = False) -> VisionLanguageModel:
    """A filled model. Padded rows of the vocabulary hold numbers too, so that a leak shows."""
    return fill(VisionLanguageModel(model, checkpoint_activations=checkpoint_activations), seed)


@dataclass
class Micro:
    """A micro-batch by attribute, as the forward reads it."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    document_ids: torch.Tensor
    positions: torch.Tensor
    kind: torch.Tensor
    source_ids: torch.Tensor
    images: torch.Tensor
    image_valid: torch.Tensor
    image_slots: torch.Tensor
    keys: list[list[str]]
    num_sources: int = 2


def micro(model: Model, packs: list[list[tuple[str, int]]], length: int, seed: int = 0) -> Micro:
    """Packs of documents; a document is (layout, number): "i" an image, "t" three text tokens, number seeds its tokens.

    Equal (layout, number) gives equal tokens, labels and images wherever the document stands. Source 1 has the odd
    numbers. Without any image there is one blank image.
    """
    shape = (len(packs), length)
    of_image = model.connector.num_tokens
    kind, document_ids = torch.zeros(shape, dtype=torch.uint8), torch.full(shape, -1)
    tokens, labels, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    source_ids, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    images, slots = [], []
    for row, documents in enumerate(packs):
        at = 0
        for number, (layout, name) in enumerate(documents):
            generator = torch.Generator().manual_seed(1000 * seed + name)
            start = at
            for part in layout:
                size = of_image if part == "i" else 3
                here = slice(at, at + size)
                if part == "i":
                    pixels = (3, *model.vision.image_size)
                    images.append(torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8))
                    slots.append(torch.arange(at, at + size) + row * length)
                    kind[row, here] = TokenKind.IMAGE
                    tokens[row, here] = 1
                else:
                    kind[row, here] = TokenKind.TEXT
                    tokens[row, here] = torch.randint(2, model.decoder.vocab_size, (size,), generator=generator)
                    labels[row, here] = torch.randint(2, model.decoder.vocab_size, (size,), generator=generator)
                    weights[row, here] = torch.rand(size, generator=generator) + 0.5
                at += size
            document_ids[row, start:at] = number
            positions[row, start:at] = torch.arange(at - start)
            source_ids[row, start:at] = name % 2
        assert at <= length
    valid = torch.tensor([True] * len(images) or [False])
    if not images:
        images = [torch.zeros(3, *model.vision.image_size, dtype=torch.uint8)]
        slots = [torch.full((of_image,), -1)]
    keys = [[f"{layout}-{name}" for layout, name in documents] for documents in packs]
    return Micro(
        tokens,
        labels,
        weights,
        document_ids,
        positions,
        kind,
        source_ids,
        torch.stack(images),
        valid,
        torch.stack(slots),
        keys,
    )
