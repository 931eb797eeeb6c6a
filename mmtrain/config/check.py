"""Rules that need more than one value, or the number of ranks. Each broken one is a sentence with its numbers."""

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from mmtrain.config.errors import ConfigError
from mmtrain.config.experts import expert_problems, upcycle_problems
from mmtrain.config.keys import exists, hint, leaves, sections, together
from mmtrain.config.layout import divides, layout_problems, multiples
from mmtrain.config.schema import PARTS, Model, Recipe
from mmtrain.config.stream import stream_problems

AT_LEAST_ONE = (
    "model.*_size",
    "model.*.num_layers",
    "model.*.num_heads",
    "model.*.num_kv_heads",
    "model.*.head_dim",
    "model.*.moe.top_k",
    "model.*.moe.every",
    "model.*.moe.granularity",
    "model.connector.num_tokens",
    "data.sequence_length",
    "data.max_images",
    "data.global_batch",
    "data.micro_batch",
    "data.window",
    "data.open_shards",
    "data.max_image_pixels",
    "parallel.tensor",
    "parallel.expert",
    "checkpoint.every",
    "checkpoint.keep_last",
    "log.every",
    "guard.spike_window",
    "eval.batches",
    "eval.matching.limit",
)
"""Counts and sizes that cannot be 0."""

ABOVE_ZERO = (
    "model.*.norm_eps",
    "model.*.rope_theta",
    "model.*.rope_scaling.*",
    "model.*.moe.routed_scale",
    "data.cache_gib",
    "optim.lr",
    "optim.eps",
    "mup.*",
)
"""Numbers that cannot be 0."""

MAY_BE_NEGATIVE = ("model.vision.select_layer", "seed")

COUNTED_FROM_ZERO = ("data.skip_packs",)
"""Lists of numbers that begin at 0; those of all others begin at 1."""

UP_TO_ONE = ("optim.final_lr_ratio", "data.max_bad_fraction")

BELOW_ONE = ("optim.beta1", "optim.beta2")


def check(recipe: Recipe, world_size: int | None) -> None:
    """Raise one ConfigError with every reason why `recipe` cannot run on `world_size` ranks.

    None: their number is not known yet, and the rules about it wait.
    """
    if found := list(problems(recipe, world_size)):
        heading = f"recipe {recipe.name} cannot run"
        if world_size is not None:
            heading += f" on {world_size} rank{'s' if world_size != 1 else ''}"
        raise ConfigError(f"{heading}: {found[0]}") if len(found) == 1 else together(heading, found)


def check_model(recipe: Recipe) -> None:
    """Raise one ConfigError with every reason why the recipe's model and its start cannot be, wherever it would run."""
    found = list(_numbers(recipe)) or [*_model(recipe.model), *_start(recipe), *_mup(recipe), *_pretrained(recipe)]
    if found:
        raise together(f"recipe {recipe.name}", found)


def problems(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    """Every rule that `recipe` breaks on `world_size` ranks; None: on any number of them."""
    if impossible := list(_numbers(recipe)):
        yield from impossible  # the rules below divide by these numbers
        return
    yield from _model(recipe.model)
    yield from _start(recipe)
    yield from stream_problems(recipe)
    yield from _length(recipe)
    yield from _eval(recipe)
    yield from _mup(recipe)
    yield from _pretrained(recipe)
    yield from _resume(recipe)
    yield from layout_problems(recipe, world_size)


def _numbers(recipe: Recipe) -> Iterator[str]:
    """Numbers out of their range, whatever the others are."""
    for key, value in leaves(recipe):
        if isinstance(value, (list, tuple)):
            least = 0 if key in COUNTED_FROM_ZERO else 1
            if min((item for item in value if isinstance(item, int)), default=least) < least:
                yield f"{key}={list(value)}: every number must be at least {least}"
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or _matches(key, MAY_BE_NEGATIVE):
            continue
        elif not math.isfinite(value):
            yield f"{key}={value} is not a finite number"
        elif _matches(key, AT_LEAST_ONE) and value < 1:
            yield f"{key}={value} must be at least 1"
        elif _matches(key, ABOVE_ZERO) and value <= 0:
            yield f"{key}={value} must be above 0"
        elif value < 0:
            yield f"{key}={value} must not be negative; 0 is the least"
        elif _matches(key, UP_TO_ONE) and value > 1:
            yield f"{key}={value} must be between 0 and 1"
        elif _matches(key, BELOW_ONE) and value >= 1:
            yield f"{key}={value} must be at least 0 and below 1"


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _model(model: Model) -> Iterator[str]:
    """The network by itself."""
    yield from _vision(model)
    yield from _connector(model)
    yield from _decoder(model)
    yield from expert_problems(model)


def _vision(model: Model) -> Iterator[str]:
    """The image tower by itself."""
    vision = model.vision
    for side, size in zip(("height", "width"), vision.image_size, strict=True):
        if size % vision.patch_size:
            yield (
                f"model.vision.image_size: {side} {size} is not a multiple of model.vision.patch_size="
                f"{vision.patch_size}; {multiples(size, vision.patch_size)}"
            )
    yield from divides("model.vision.hidden_size", vision.hidden_size, "model.vision.num_heads", vision.num_heads)
    if not -vision.num_layers <= vision.select_layer <= -1:
        nearest = -1 if vision.select_layer > -1 else -vision.num_layers
        yield (
            f"model.vision.select_layer={vision.select_layer} must be between -{vision.num_layers} (the first of "
            f"{vision.num_layers} layers) and -1 (the last); the nearest is {nearest}"
        )


def _connector(model: Model) -> Iterator[str]:
    """The connector between a grid of patches and the decoder."""
    connector, (rows, columns) = model.connector, model.vision.grid()
    tokens = connector.num_tokens
    root = math.isqrt(tokens)
    if connector.kind == "mlp":
        if tokens != rows * columns:
            yield (
                f"model.connector.num_tokens={tokens}: kind mlp makes one token of each patch, and the grid has "
                f"{rows} x {columns} = {rows * columns} patches; give {rows * columns}, or take another kind"
            )
    elif root * root != tokens:
        yield (
            f"model.connector.num_tokens={tokens} is not a square number; "
            f"the nearest are {root * root} and {(root + 1) ** 2}"
        )
    if connector.kind == "attention_pool":
        yield from divides(
            "model.connector.hidden_size", connector.hidden_size, "model.connector.num_heads", connector.num_heads
        )


def _decoder(model: Model) -> Iterator[str]:
    """The language model by itself."""
    decoder = model.decoder
    yield from divides("model.decoder.num_heads", decoder.num_heads, "model.decoder.num_kv_heads", decoder.num_kv_heads)
    if decoder.rope and decoder.head_dim % 2:
        yield (
            f"model.decoder.head_dim={decoder.head_dim} is odd, and rotary positions turn pairs; "
            f"the nearest are {decoder.head_dim - 1} and {decoder.head_dim + 1}"
        )


def _start(recipe: Recipe) -> Iterator[str]:
    """Where weights come from."""
    model = recipe.model
    if (
        recipe.requires_pretrained
        and not recipe.init_from
        and not (model.vision.pretrained and model.decoder.pretrained)
    ):
        yield (
            "init_from is empty: this recipe starts from pretrained weights and makes no sense without them; "
            "give init_from=CHECKPOINT, or model.vision.pretrained=FOLDER and model.decoder.pretrained=FOLDER"
        )
    if not recipe.trainable:
        yield "trainable is empty, so nothing would learn; trainable: ['*'] trains everything"
    yield from upcycle_problems(recipe)


def _length(recipe: Recipe) -> Iterator[str]:
    """How long the stage is, and its schedule."""
    if not recipe.steps and not recipe.epochs:
        yield "steps=0 and epochs=0: the stage has no length; give one of them"
    if recipe.steps and recipe.epochs:
        yield f"steps={recipe.steps} and epochs={recipe.epochs:g} are both given; set one of them to 0"
    if recipe.steps and recipe.optim.warmup_steps >= recipe.steps:
        yield (
            f"optim.warmup_steps={recipe.optim.warmup_steps} leaves none of steps={recipe.steps} at the full rate; "
            f"the nearest is {recipe.steps - 1}"
        )


def _eval(recipe: Recipe) -> Iterator[str]:
    """Measuring inside the loop."""
    measured = recipe.eval
    if recipe.checkpoint.keep_best and not (measured.every and measured.sources):
        lacking = "eval.every=0" if not measured.every else "eval.sources is empty"
        yield (
            f"checkpoint.keep_best needs a held-out loss, but {lacking}; "
            "give eval.every and eval.sources, or set checkpoint.keep_best=false"
        )
    if measured.every and not measured.sources and measured.matching is None:
        yield (
            f"eval.every={measured.every} has nothing to measure; "
            "give eval.sources or eval.matching, or set eval.every=0"
        )
    if measured.every and measured.sources and not any(source.weight for source in measured.sources.values()):
        yield f"eval.sources: every weight is 0 ({', '.join(measured.sources)}); raise one, or set eval.every=0"
    for name, source in measured.sources.items():
        if source.max_epochs:
            yield (
                f"eval.sources.{name}.max_epochs={source.max_epochs:g}: a held-out source is read once at most, up to "
                "eval.batches; leave it out"
            )


def _mup(recipe: Recipe) -> Iterator[str]:
    """Names in the muP section; mup.scales checks that the base model can exist."""
    if recipe.optim.name == "sgd" and any(recipe.mup.base.values()):
        yield (
            "optim.name=sgd with mup.base: muP's rates are those of Adam's update, and SGD needs other powers of the "
            "width; take adamw, or leave mup.base out"
        )
    factor, kind = recipe.mup.cross_attention, recipe.model.connector.kind
    if factor != 1.0 and kind != "attention_pool":
        yield (
            f"mup.cross_attention={factor:g}: model.connector.kind={kind} has no cross-attention; leave it at 1, or "
            "take attention_pool"
        )
    for part in recipe.mup.lr:
        if part not in PARTS:
            yield f"mup.lr.{part}: no such part{hint(part, PARTS)}"
    for part, widths in recipe.mup.base.items():
        if part not in PARTS:
            yield f"mup.base.{part}: no such part{hint(part, PARTS)}"
            continue
        counts = [name for name, kind in sections(type(getattr(recipe.model, part))).items() if kind is int]
        for key in widths:
            if key not in (*counts, "num_experts"):
                yield f"mup.base.{part}.{key}: no width of {part}{hint(key, (*counts, 'num_experts'))}"


def _pretrained(recipe: Recipe) -> Iterator[str]:
    """The base widths of a pretrained part are its own, and no factor changes what it computes."""
    factors = {
        "vision": ("attention",),
        "connector": ("cross_attention",),
        "decoder": ("attention", "embedding", "output"),
    }
    for part in PARTS:
        own = getattr(recipe.model, part)
        if not own.pretrained:
            continue
        for key, base in recipe.mup.base.get(part, {}).items():
            if key != "num_experts" and base != getattr(own, key, base):
                yield (
                    f"mup.base.{part}.{key}={base}: model.{part} is pretrained, so its base widths are its own "
                    f"({getattr(own, key)}); leave mup.base.{part} out"
                )
        for factor in factors[part]:
            if (value := getattr(recipe.mup, factor)) != 1.0:
                yield (
                    f"mup.{factor}={value:g} would change what the pretrained model.{part} computes; "
                    f'leave it at 1, or set model.{part}.pretrained to ""'
                )


def _resume(recipe: Recipe) -> Iterator[str]:
    """Keys that a resumed run may change."""
    for key in recipe.resume_allow:
        if not exists(key):
            yield f"resume_allow: {key!r} is no key of a recipe{hint(key, (known for known, _ in leaves(recipe)))}"
