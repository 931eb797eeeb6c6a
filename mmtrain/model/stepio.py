"""What goes into the model's forward besides the batch, and what comes out."""

from typing import NamedTuple, Protocol

import torch

from mmtrain.config.schema import Model
from mmtrain.model.probe import GradientProbe
from mmtrain.model.router import RouterInput


class BatchLike(Protocol):
    """What the forward reads of a micro-batch; mmtrain.data.record.Batch says what each field holds."""

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
    num_sources: int


class PartRouterInput(NamedTuple):
    """State and constants of one part's routers in one optimizer step."""

    load_share: torch.Tensor
    """[layers, E] fp32: each expert's share of the choices in the previous step's global batch; rows sum to 1."""
    bias: torch.Tensor
    """[layers, E] fp32 loss-free bias; zeros unless balance is bias."""
    valid_total: torch.Tensor
    """[] fp32: valid tokens of this part in the global batch."""

    def layer(self, sparse_layer: int) -> RouterInput:
        """What the `sparse_layer`-th sparse layer (from 0) needs."""
        return RouterInput(self.load_share[sparse_layer], self.valid_total, self.bias[sparse_layer])


class RouterStats(NamedTuple):
    """What one sparse layer's router reports, or a part's routers together."""

    balance: torch.Tensor
    """[] raw balance loss; of a part, the mean over its sparse layers."""
    z: torch.Tensor
    """[] raw z-loss; of a part, the mean over its sparse layers."""
    counts: torch.Tensor
    """[E] choices of valid tokens, all k, detached; of a part, [layers, E]."""
    probability: torch.Tensor
    """[E] sum over valid tokens of each expert's probability, detached; of a part, [layers, E]."""


class StepInputs(NamedTuple):
    """Numbers of the whole optimizer step that the loss divides by, known before its first forward."""

    label_weight: torch.Tensor
    """[] fp32: W, all label weights of the global batch."""
    routers: dict[str, PartRouterInput]
    """Part -> its routers' inputs, for parts with experts."""
    probe: GradientProbe | None = None
    """Where the loss gradient at the decoder's input is looked at; None in steps whose norms nobody reads."""


class Losses(NamedTuple):
    """Sums and means of one micro-batch. Added over the micro-batches of all ranks, they are those of the step."""

    total: torch.Tensor
    """[] language_sum / W + router losses times their coefficients; the others are detached, so they may be kept."""
    language_sum: torch.Tensor
    """[] sum of weight * cross-entropy, not divided."""
    weight_sum: torch.Tensor
    """[] sum of weights."""
    by_source_sum: torch.Tensor
    """[S] language_sum by source, detached."""
    by_source_weight: torch.Tensor
    """[S] weight_sum by source."""
    balance: dict[str, torch.Tensor]
    """Part -> [] raw balance loss, mean over its sparse layers."""
    z: dict[str, torch.Tensor]
    """Part -> [] raw z-loss, mean over its sparse layers."""
    counts: dict[str, torch.Tensor]
    """Part -> [layers, E] choices of valid tokens, detached."""
    probability: dict[str, torch.Tensor]
    """Part -> [layers, E] sums over valid tokens of the experts' probabilities, detached."""


def summarise(layers: list[RouterStats]) -> RouterStats | None:
    """Join the reports of a part's sparse layers; None without any."""
    if not layers:
        return None
    return RouterStats(
        torch.stack([layer.balance for layer in layers]).mean(),
        torch.stack([layer.z for layer in layers]).mean(),
        torch.stack([layer.counts for layer in layers]),
        torch.stack([layer.probability for layer in layers]),
    )


def sparse_layers(model: Model) -> dict[str, int]:
    """Part -> number of its sparse layers, for parts that have any."""
    layers = {
        "vision": sum(map(model.vision.moe.is_sparse, range(model.vision.built_layers()))),
        "connector": int(model.connector.moe.num_experts > 0),
        "decoder": sum(map(model.decoder.moe.is_sparse, range(model.decoder.num_layers))),
    }
    return {part: count for part, count in layers.items() if count}


def first_inputs(
    model: Model,
    label_weight: float = 1.0,
    valid_tokens: dict[str, float] | None = None,
    device: torch.device | str = "cpu",
) -> StepInputs:
    """Inputs of a first step: every expert's share is 1/E, no bias; also right where only logits are wanted.

    valid_tokens: part -> valid tokens of the global batch, 1 for parts that are not named.
    """
    routers = {}
    for part, layers in sparse_layers(model).items():
        shape = (layers, getattr(model, part).moe.num_experts)
        routers[part] = PartRouterInput(
            torch.full(shape, 1.0 / shape[1], device=device),
            torch.zeros(shape, device=device),
            torch.tensor(float((valid_tokens or {}).get(part, 1.0)), device=device),
        )
    return StepInputs(torch.tensor(float(label_weight), device=device), routers)
