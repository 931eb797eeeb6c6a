"""What a coordinate check trains: a recipe's model at several widths, a drawn batch, and mistakes to be caught."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from mmtrain.config.schema import PARTS, Model, Recipe
from mmtrain.config.tokens import TokenKind
from mmtrain.data.record import Batch
from mmtrain.model.build import meta_model
from mmtrain.model.stepio import StepInputs, first_inputs
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.coord import Recording, change, recording
from mmtrain.mup.init import initialize
from mmtrain.mup.registry import Entry, Registry
from mmtrain.mup.roles import Scales
from mmtrain.mup.scales import forward_scales
from mmtrain.optim.groups import param_groups

Grow = Literal["head_size", "heads"]
IMAGES_OF_PACK, TEXT_OF_IMAGE = 2, 24


class Setup(NamedTuple):
    """What one width is trained with."""

    recipe: Recipe
    base: Model
    registry: Registry
    scales: Scales


# ---- what is trained


def wider(base: Model, factor: int, grow: Grow) -> Model:
    """`base` with every width times `factor`; depth, experts, and key and value heads stay."""
    heads, size = (factor, 1) if grow == "heads" else (1, factor)
    vision = replace(
        base.vision,
        hidden_size=base.vision.hidden_size * factor,
        num_heads=base.vision.num_heads * heads,
        intermediate_size=base.vision.intermediate_size * factor,
    )
    connector = replace(
        base.connector, hidden_size=base.connector.hidden_size * factor, num_heads=base.connector.num_heads * heads
    )
    decoder = replace(
        base.decoder,
        hidden_size=base.decoder.hidden_size * factor,
        num_heads=base.decoder.num_heads * heads,
        head_dim=base.decoder.head_dim * size,
        intermediate_size=base.decoder.intermediate_size * factor,
    )
    return replace(base, vision=vision, connector=connector, decoder=decoder)


def mup(recipe: Recipe, base: Model, factor: int, grow: Grow) -> Setup:
    """`recipe` at `factor` times the base widths."""
    model = wider(base, factor, grow)
    registry = Registry.build(meta_model(model), meta_model(base), recipe.mup)
    return Setup(replace(recipe, model=model), base, registry, forward_scales(model, base, recipe.mup))


def standard(made: Setup) -> Setup:
    """The same width in standard parametrisation: its own base."""
    model, multipliers = made.recipe.model, made.recipe.mup
    registry = Registry.build(meta_model(model), meta_model(model), multipliers)
    return made._replace(registry=registry, scales=forward_scales(model, model, multipliers))


def draw(recipe: Recipe, seed: int) -> Batch:
    """A micro-batch: packs of a few documents, each an image and random text, in the form of the loader's."""
    model, packs, generator = recipe.model, recipe.data.micro_batch, torch.Generator().manual_seed(seed)
    per_image, images = model.connector.num_tokens, packs * IMAGES_OF_PACK
    length = IMAGES_OF_PACK * (per_image + TEXT_OF_IMAGE)
    place = torch.arange(length).expand(packs, -1)
    document, position = place // (per_image + TEXT_OF_IMAGE), place % (per_image + TEXT_OF_IMAGE)
    is_image = position < per_image
    tokens = torch.randint(0, model.decoder.vocab_size, (packs, length), generator=generator)
    tokens[is_image] = 0
    labels = tokens.roll(-1, 1)
    weights = ((position >= per_image) & (position < per_image + TEXT_OF_IMAGE - 1)).float()
    height, width = model.vision.image_size
    return Batch(
        tokens=tokens,
        labels=torch.where(weights > 0, labels, 0),
        weights=weights,
        document_ids=document,
        positions=position,
        kind=torch.where(is_image, int(TokenKind.IMAGE), int(TokenKind.TEXT)).to(torch.uint8),
        source_ids=torch.zeros_like(tokens),
        images=torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=generator),
        image_valid=torch.ones(images, dtype=torch.bool),
        image_slots=is_image.flatten().nonzero().view(images, per_image),
        keys=[[f"drawn{pack}"] * IMAGES_OF_PACK for pack in range(packs)],
        num_sources=1,
    )


def inputs_of(recipe: Recipe, batch: Batch) -> StepInputs:
    """The constants of a step that is this batch alone."""
    rows, columns = recipe.model.vision.grid()
    images, tokens = len(batch.images), recipe.model.connector.num_tokens
    seen = (images * (rows * columns + recipe.model.vision.class_token), images * tokens, batch.tokens.numel())
    return first_inputs(recipe.model, float(batch.weights.sum()), dict(zip(PARTS, map(float, seen), strict=True)))


def observe(model: VisionLanguageModel, batch: Batch, inputs: StepInputs) -> Recording:
    """Every probe of a forward, the logits of all supervised positions among them."""
    with torch.no_grad(), recording(model) as kept:
        logits = model(batch, inputs, logits_at=batch.weights.flatten().nonzero().squeeze(1))
    kept.activations["logits decoder.head"] = logits
    return kept


def train(made: Setup, seed: int, steps: int) -> tuple[dict[str, float], list[str]]:
    """AdamW at the peak rates, without clipping. Size of the change of every probe; wrong factors in the forward."""
    model = VisionLanguageModel(made.recipe.model, made.scales)
    initialize(model, made.registry, seed)
    batch, optim = draw(made.recipe, seed), made.recipe.optim
    inputs = inputs_of(made.recipe, batch)
    groups = param_groups(dict(model.named_parameters()), made.registry, made.recipe)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    before = observe(model, batch, inputs)
    wrong = wrong_factors(made, model, before, batch)
    for _ in range(steps):
        model(batch, inputs).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # its memory is the next step's
    return change(before.activations, observe(model, batch, inputs).activations), wrong


def wrong_factors(made: Setup, model: VisionLanguageModel, seen: Recording, batch: Batch) -> list[str]:
    """Factors measured in the forward that are not muP's (mmtrain/mup/scales.py): on attention logits and on logits."""
    config, base, tuned = made.recipe.model, made.base, made.recipe.mup
    sizes = {
        "vision": [part.hidden_size // part.num_heads for part in (config.vision, base.vision)],
        "connector": [part.hidden_size // part.num_heads for part in (config.connector, base.connector)],
        "decoder": [config.decoder.head_dim, base.decoder.head_dim],
    }
    multipliers = {"vision": tuned.attention, "connector": tuned.cross_attention, "decoder": tuned.attention}
    found = []
    for name, scale in seen.scales.items():
        part = name.partition(".")[0]
        size, at_base = sizes[part]
        wanted = math.sqrt(at_base) / size * multipliers[part]
        if not math.isclose(scale, wanted, rel_tol=1e-3):
            formula = f"{multipliers[part]:g} x sqrt({at_base}) / {size}"
            found.append(f"{name}: the factor on q.k is {scale:.4g}, not {formula} = {wanted:.4g}")
    hidden = seen.activations["hidden decoder.norm"].flatten(0, 1)[batch.weights.flatten() > 0]
    plain = hidden @ model.decoder.head.weight[: config.decoder.vocab_size].t().detach()
    factor = float((plain * seen.activations["logits decoder.head"]).sum() / plain.square().sum())
    wanted = tuned.output * base.decoder.hidden_size / config.decoder.hidden_size
    if not math.isclose(factor, wanted, rel_tol=1e-3):
        found.append(f"decoder.head: the factor on logits is {factor:.4g}, not {wanted:.4g}")
    return found


# ---- faults, each a mistake that a program has made


def flattened_lr(made: Setup) -> Setup:
    """A scheduler writes one rate into all groups."""
    return _entries(made, lambda _, entry: replace(entry, lr_mult=1.0))


def hidden_router(made: Setup) -> Setup:
    """The router of a fixed number of experts starts like a hidden matrix."""
    return _entries(
        made,
        lambda _, entry: (
            replace(entry, init_std=entry.init_std * entry.m_in**0.5) if entry.role.kind == "router" else entry
        ),
    )


def scaled_embedding_lr(made: Setup) -> Setup:
    """Embeddings and patches learn at the rate of a hidden matrix."""
    return _entries(
        made,
        lambda _, entry: replace(entry, lr_mult=entry.lr_mult / entry.m_out) if entry.role.kind == "input" else entry,
    )


def plain_attention(made: Setup) -> Setup:
    """Attention logits are divided by the square root of the head size."""
    return made._replace(
        scales=replace(made.scales, attention_vision=None, attention_connector=None, attention_decoder=None)
    )


def plain_output(made: Setup) -> Setup:
    """The logits have no factor 1/m."""
    return made._replace(scales=replace(made.scales, output=made.recipe.mup.output))


Change = Callable[[Setup], Setup]

FAULTS: tuple[Change, ...] = (flattened_lr, hidden_router, scaled_embedding_lr, plain_attention, plain_output)


def _entries(made: Setup, changed: Callable[[str, Entry], Entry]) -> Setup:
    entries = made.registry.entries
    return made._replace(registry=Registry({name: changed(name, entry) for name, entry in entries.items()}))
