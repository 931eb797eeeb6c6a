"""A tiny recipe with experts in all three parts, and global batches that are unequal in every way that matters."""

from dataclasses import replace
from typing import NamedTuple

import torch

from mmtrain.config.schema import Connector, Data, Decoder, Model, Moe, Mup, Optim, Parallel, Recipe, Vision
from mmtrain.config.tokens import TokenKind
from mmtrain.data.record import Batch

BASE = {
    "vision": {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32},
    "connector": {"hidden_size": 12},
    "decoder": {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24},
}
GLOBAL_BATCH = 8
SEQUENCE = 32
SOURCES = 3
PERIOD = 6


def recipe(optimizer: str = "adamw", parallel: Parallel = Parallel(), experts: int = 4) -> Recipe:  # noqa: B008
    """Wider than BASE in every part; experts beside a shared one in vision, and narrow ones in the decoder; CuMo's
    router losses; clipping in every step, by the global norm with AdamW and by
    each part's own with SGD; weight decay; multipliers not 1."""
    moe = Moe(num_experts=experts, top_k=2, balance_coef=0.1, z_coef=0.01)
    model = Model(
        vision=Vision(
            image_size=(16, 24),
            patch_size=8,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            intermediate_size=64,
            select_layer=-2,
            moe=replace(moe, every=2, shared=1, routed_scale=0.8),
        ),
        connector=Connector(kind="c_abstractor", num_tokens=4, hidden_size=24, depth=1, moe=moe),
        decoder=Decoder(
            vocab_size=150,
            hidden_size=32,
            num_layers=2,
            num_heads=8,
            num_kv_heads=4,
            head_dim=8,
            intermediate_size=48,
            qk_norm=True,
            attention_bias=True,
            moe=replace(moe, granularity=2, shared=1, routed_scale=1.2),
        ),
    )
    adam = Optim(name="adamw", lr=2e-3, weight_decay=0.1, eps=1e-4, clip=0.5, schedule="constant", warmup_steps=2)
    return Recipe(
        name="tiny",
        out="unused",
        steps=6,
        model=model,
        data=Data(sequence_length=SEQUENCE, global_batch=GLOBAL_BATCH, tokenizer="unused"),
        optim=adam if optimizer == "adamw" else replace(adam, name="sgd", lr=0.05, clip_scope="per_part"),
        mup=Mup(base=BASE, init=0.6, embedding=8.0, attention=0.75, output=1.25, router=1.5, lr={"vision": 0.5}),
        parallel=parallel,
    )


def uneven(recipe: Recipe) -> Recipe:
    """Coefficients that differ by part, and a connector that is balanced by bias alone (see UNUSED)."""
    model = recipe.model
    vision = replace(model.vision, moe=replace(model.vision.moe, balance_coef=0.05, z_coef=0.002))
    moe = replace(model.connector.moe, balance="bias", balance_coef=0.0, bias_rate=0.01)
    decoder = replace(model.decoder, moe=replace(model.decoder.moe, balance_coef=0.02))
    connector = replace(model.connector, moe=moe)
    return replace(recipe, model=replace(model, vision=vision, connector=connector, decoder=decoder))


def half_dense(recipe: Recipe) -> Recipe:
    """Experts in every other layer of the decoder."""
    decoder = replace(recipe.model.decoder, moe=replace(recipe.model.decoder.moe, every=2))
    return replace(recipe, model=replace(recipe.model, decoder=decoder))


UNUSED = 3
"""An expert whose bias is -10 where a part is balanced by bias: no token ever chooses it."""


class Pack(NamedTuple):
    """One pack of T positions and its images."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    document_ids: torch.Tensor
    positions: torch.Tensor
    kind: torch.Tensor
    source_ids: torch.Tensor
    images: torch.Tensor
    slots: torch.Tensor


def packs(model: Model, step: int, seed: int = 0, count: int = GLOBAL_BATCH) -> list[Pack]:
    """The packs of one global batch. Packs of its second half have no image in odd steps; one pack in step 2 has no
    label, one in step 3 is empty; the last source ends before step 4. After PERIOD steps they come again."""
    made, step = [], step % PERIOD
    for number in range(count):
        generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * step + number)
        images = 0 if step % 2 and number >= count // 2 else int(torch.randint(0, 3, (), generator=generator))
        pack = _pack(model, images, step == 3 and number == count - 1, generator)
        if step == 2 and number == 1:
            pack = pack._replace(weights=torch.zeros_like(pack.weights))
        if step >= 4:
            pack = pack._replace(source_ids=pack.source_ids % (SOURCES - 1))
        made.append(pack)
    return made


def _pack(model: Model, images: int, empty: bool, generator: torch.Generator) -> Pack:
    """Documents of an optional image and some text, then padding."""
    height, width = model.vision.image_size
    length, per_image = SEQUENCE, model.connector.num_tokens
    fields = {name: torch.zeros(length, dtype=torch.int64) for name in ("tokens", "labels", "positions", "source_ids")}
    kind = torch.full((length,), int(TokenKind.PADDING), dtype=torch.uint8)
    document_ids, weights, slots = torch.full((length,), -1), torch.zeros(length), []
    at, document = 0, 0
    while not empty and at < length - 10 and document < 3:
        begin = at
        if len(slots) < images:
            slots.append(torch.arange(at, at + per_image))
            kind[at : at + per_image] = int(TokenKind.IMAGE)
            at += per_image
        text = int(torch.randint(3, 7, (), generator=generator))
        fields["tokens"][at : at + text] = torch.randint(4, model.decoder.vocab_size, (text,), generator=generator)
        kind[at : at + text] = int(TokenKind.TEXT)
        at += text
        fields["labels"][begin : at - 1] = fields["tokens"][begin + 1 : at]
        choices = torch.tensor([0.0, 0.5, 1.0, 1.0])
        drawn = choices[torch.randint(0, 4, (text - 1,), generator=generator)]
        weights[at - text : at - 1] = drawn
        fields["positions"][begin:at] = torch.arange(at - begin)
        fields["source_ids"][begin:at] = int(torch.randint(0, SOURCES, (), generator=generator))
        document_ids[begin:at] = document
        document += 1
    fields["labels"][weights == 0] = 0
    pixels = torch.randint(0, 256, (len(slots), 3, height, width), dtype=torch.uint8, generator=generator)
    where = torch.stack(slots) if slots else torch.zeros(0, per_image, dtype=torch.int64)
    return Pack(weights=weights, document_ids=document_ids, kind=kind, images=pixels, slots=where, **fields)


def collate(model: Model, chosen: list[Pack]) -> Batch:
    """A micro-batch of these packs; one blank image when none of them has any."""
    stacked = {name: torch.stack([getattr(pack, name) for pack in chosen]) for name in Pack._fields[:7]}
    images = torch.cat([pack.images for pack in chosen])
    slots = torch.cat([pack.slots + number * SEQUENCE for number, pack in enumerate(chosen)])
    valid = torch.ones(len(images), dtype=torch.bool)
    if not len(images):
        images = torch.zeros(1, 3, *model.vision.image_size, dtype=torch.uint8)
        slots = torch.full((1, model.connector.num_tokens), -1)
        valid = torch.zeros(1, dtype=torch.bool)
    keys = [[f"pack{number}"] * 3 for number in range(len(chosen))]
    return Batch(**stacked, images=images, image_valid=valid, image_slots=slots, keys=keys, num_sources=SOURCES)


def micro_batches(model: Model, chosen: list[Pack], accumulation: int) -> list[Batch]:
    """One rank's packs as `accumulation` micro-batches."""
    size = len(chosen) // accumulation
    return [collate(model, chosen[start : start + size]) for start in range(0, len(chosen), size)]


def label_weight(chosen: list[Pack]) -> float:
    """W of these packs."""
    return float(sum(pack.weights.sum() for pack in chosen))


def valid_tokens(model: Model, chosen: list[Pack]) -> dict[str, float]:
    """Tokens of each part that its routers count."""
    images = sum(len(pack.images) for pack in chosen)
    rows, columns = model.vision.grid()
    return {
        "vision": float(images * (rows * columns + model.vision.class_token)),
        "connector": float(images * model.connector.num_tokens),
        "decoder": float(sum((pack.document_ids >= 0).sum() for pack in chosen)),
    }
