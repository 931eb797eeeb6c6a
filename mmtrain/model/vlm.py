"""The vision-language model: images -> features -> decoder tokens, spliced into text, to one loss.

Letters: B packs, T positions, N images, M tokens of an image, d decoder width.
"""

import torch
from torch import nn

from mmtrain.config.errors import DataError
from mmtrain.config.schema import PARTS, Model
from mmtrain.config.tokens import TokenKind
from mmtrain.model.attention import KVCache
from mmtrain.model.connector import build_connector
from mmtrain.model.decoder import Decoder
from mmtrain.model.stepio import BatchLike, Losses, RouterStats, StepInputs
from mmtrain.model.vision import VisionEncoder
from mmtrain.mup.roles import Scales

PLAIN = Scales()


class VisionLanguageModel(nn.Module):
    """Vision encoder, connector and decoder. Parameters are empty until something fills them by name."""

    def __init__(self, model: Model, scales: Scales = PLAIN, checkpoint_activations: bool = False) -> None:
        """scales: muP's factors in the forward. checkpoint_activations: recompute blocks in backward."""
        super().__init__()
        self.config = model
        self.embedding_scale = scales.embedding
        self.vision = VisionEncoder(model.vision, scales.attention_vision, checkpoint_activations)
        self.connector = build_connector(model, scales.attention_connector)
        self.decoder = Decoder(model.decoder, scales, checkpoint_activations)

    def forward(
        self,
        batch: BatchLike,
        inputs: StepInputs,
        logits_at: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Losses | torch.Tensor:
        """Losses of a micro-batch, or with `logits_at` (flat indices into B * T) the logits [len, V] there.

        cache: generation; the decoder reads on from it. Such a batch may have no images at all (N = 0), while a
        training batch has at least one, blank if need be, so that every parameter takes part on every rank.
        Raises DataError where image placeholders and images do not match.
        """
        reports: dict[str, RouterStats | None] = {}
        embeddings = self.decoder.embedding(batch.tokens)
        if batch.images.shape[0] > 0:
            features, reports["vision"] = self.vision(batch.images, batch.image_valid, inputs.routers.get("vision"))
            tokens, reports["connector"] = self.connector(features, batch.image_valid, inputs.routers.get("connector"))
            embeddings = splice(embeddings, self.embedding_scale, tokens, batch)
        elif self.embedding_scale != 1.0:
            embeddings = embeddings * self.embedding_scale
        if inputs.probe is not None:
            embeddings = inputs.probe(embeddings, batch.kind)
        hidden, reports["decoder"] = self.decoder(
            embeddings, batch.positions, batch.document_ids, inputs.routers.get("decoder"), cache
        )
        hidden = hidden.flatten(0, 1)
        if logits_at is not None:
            return self.decoder.head(hidden[logits_at])
        sums = self.decoder.head(
            hidden, batch.labels.flatten(), batch.weights.flatten(), batch.source_ids.flatten(), batch.num_sources
        )
        return self._losses(inputs, *sums, {part: report for part, report in reports.items() if report is not None})

    def _losses(
        self,
        inputs: StepInputs,
        language_sum: torch.Tensor,
        by_source_sum: torch.Tensor,
        by_source_weight: torch.Tensor,
        reports: dict[str, RouterStats],
    ) -> Losses:
        """Add the parts' router losses, times their coefficients, to the language loss."""
        total = language_sum / inputs.label_weight
        for part in PARTS:
            if part in reports:
                moe = getattr(self.config, part).moe
                balance_coef = moe.balance_coef if moe.balance == "loss" else 0.0
                total = total + balance_coef * reports[part].balance + moe.z_coef * reports[part].z
        return Losses(
            total=total,
            language_sum=language_sum.detach(),
            weight_sum=by_source_weight.sum(),
            by_source_sum=by_source_sum,
            by_source_weight=by_source_weight,
            balance={part: report.balance.detach() for part, report in reports.items()},
            z={part: report.z.detach() for part, report in reports.items()},
            counts={part: report.counts for part, report in reports.items()},
            probability={part: report.probability for part, report in reports.items()},
        )


def splice(embeddings: torch.Tensor, scale: float, image_tokens: torch.Tensor, batch: BatchLike) -> torch.Tensor:
    """Put image tokens [N, M, d] where the batch's placeholders are; the others are embeddings [B, T, d] * scale.

    An image that stands in several places has the slots of one place after those of another: [N, places * M].
    Tokens of invalid images are multiplied by 0 and stay in the graph, so that both towers get zero gradients rather
    than none. Raises DataError where placeholders and images do not match.
    """
    is_image = batch.kind == TokenKind.IMAGE
    _check_slots(is_image, image_tokens.shape[1], batch)
    keep = torch.where(is_image, 0.0, scale).to(embeddings.dtype)
    mixed = embeddings * keep.unsqueeze(-1)
    places = batch.image_slots.shape[1] // image_tokens.shape[1]
    if places > 1:
        image_tokens = image_tokens.repeat(1, places, 1)
    placed = (batch.image_slots >= 0) & batch.image_valid.unsqueeze(1)
    image_tokens = image_tokens * placed.to(image_tokens.dtype).unsqueeze(-1)
    slots = batch.image_slots.clamp(min=0).flatten()
    return mixed.view(-1, mixed.shape[-1]).index_add(0, slots, image_tokens.flatten(0, 1)).view_as(mixed)


def _check_slots(is_image: torch.Tensor, tokens_per_image: int, batch: BatchLike) -> None:
    """Every placeholder is the slot of exactly one token of a valid image, or DataError names the first sample."""
    if batch.image_slots.shape[1] % tokens_per_image:
        raise DataError(
            f"the batch has {batch.image_slots.shape[1]} slots for each image, but the connector makes "
            f"{tokens_per_image} tokens of an image: data and model were built from different recipes"
        )
    filled = torch.zeros(is_image.numel() + 1, dtype=torch.int64, device=is_image.device)
    usable = batch.image_valid.unsqueeze(1) & (batch.image_slots >= 0) & (batch.image_slots < is_image.numel())
    slots = torch.where(usable, batch.image_slots, is_image.numel()).flatten()
    filled = filled.scatter_add_(0, slots, torch.ones_like(slots))[:-1].view_as(is_image)
    if torch.equal(filled, is_image.to(filled.dtype)):
        return
    pack, position = (filled != is_image).nonzero()[0].tolist()
    own = batch.document_ids[pack] == batch.document_ids[pack, position]
    number = int(batch.document_ids[pack, position])
    key = batch.keys[pack][number] if 0 <= number < len(batch.keys[pack]) else "(padding)"
    raise DataError(
        f"sample {key!r} (pack {pack} of the micro-batch) has {int(is_image[pack][own].sum())} image placeholders, but "
        f"its images bring {int(filled[pack][own].sum())} tokens: every image is {tokens_per_image} placeholders; "
        "rebuild its shard's index, or leave the sample out"
    )
