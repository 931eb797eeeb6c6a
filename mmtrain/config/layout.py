"""Rules of the layout: what DeepSpeed, tensor ranks, expert ranks and data ranks can share."""

from collections.abc import Iterator

from mmtrain.config.schema import PARTS, Data, Model, Moe, Parallel, Recipe


def layout_problems(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    """Every rule of the layout that `recipe` breaks on `world_size` ranks; None: on any number of them."""
    yield from engine_problems(recipe.parallel)
    yield from _tensor(recipe.model, recipe.parallel.tensor)
    yield from _sequence(recipe)
    yield from _experts(recipe)
    if world_size is not None:
        yield from _ranks(recipe, world_size)


def engine_problems(layout: Parallel) -> Iterator[str]:
    """Pairs of settings that DeepSpeed gets wrong or refuses (mmtrain/parallel/README.md, traps 4 and 14)."""
    if layout.zero_stage == 0 and layout.expert > 1:
        yield (
            f"parallel.zero_stage=0 with parallel.expert={layout.expert} clips with a wrong gradient norm; "
            "take zero_stage 1, 2 or 3, or expert=1"
        )
    if layout.zero_stage == 0 and layout.precision == "bf16":
        yield (
            "parallel.zero_stage=0 with precision=bf16 cannot sum gradients in fp32; "
            "take zero_stage 1, or precision=fp32"
        )
    if layout.zero_stage == 0 and layout.offload_optimizer:
        yield "parallel.offload_optimizer needs sharded optimizer state; take zero_stage 1, 2 or 3"


def _tensor(model: Model, tensor: int) -> Iterator[str]:
    """What tensor ranks share must be divisible by their number."""
    vision, connector, decoder = model.vision, model.connector, model.decoder
    shared = {
        "model.vision.num_heads": vision.num_heads,
        "model.vision.intermediate_size": vision.intermediate_size,
        "model.decoder.num_heads": decoder.num_heads,
        "model.decoder.intermediate_size": decoder.intermediate_size,
        hidden_width(model, "connector")[0]: hidden_width(model, "connector")[1],
    }
    if connector.kind == "attention_pool":
        shared["model.connector.num_heads"] = connector.num_heads
    for part, moe in sparse_parts(model):
        key, width = hidden_width(model, part)
        if moe.granularity > 1 and width % moe.granularity == 0:
            shared[f"{key} / model.{part}.moe.granularity"] = moe.expert_width(width)
    for key, size in shared.items():
        if size % tensor:
            yield f"{key}={size} is not a multiple of parallel.tensor={tensor}; tensor sizes that fit: {divisors(size)}"
    if decoder.num_kv_heads % tensor:
        less = "less than" if decoder.num_kv_heads < tensor else "not a multiple of"
        yield (
            f"model.decoder.num_kv_heads={decoder.num_kv_heads} is {less} parallel.tensor={tensor}, and a head cannot "
            f"be cut; tensor sizes that fit: {divisors(decoder.num_kv_heads)}"
        )
    if decoder.padded_vocab() % tensor:
        yield (
            f"model.decoder.vocab_size={decoder.vocab_size}, padded to {decoder.padded_vocab()}, is not a multiple of "
            f"parallel.tensor={tensor}; tensor sizes that fit: {divisors(decoder.padded_vocab())}"
        )


def _sequence(recipe: Recipe) -> Iterator[str]:
    """Tensor ranks that share positions hold equally many."""
    tensor, length = recipe.parallel.tensor, recipe.data.sequence_length
    if not recipe.parallel.sequence_parallel:
        return
    if tensor == 1:
        yield (
            "parallel.sequence_parallel=true shares the positions over tensor ranks, and parallel.tensor=1 has no "
            "other; set it to false, or parallel.tensor to 2 or more"
        )
    yield from divides("data.sequence_length", length, "parallel.tensor", tensor)


def hidden_width(model: Model, part: str) -> tuple[str, int]:
    """Key and value of the hidden width that a dense MLP of the part has."""
    if part == "connector":
        return "model.decoder.hidden_size", model.decoder.hidden_size
    return f"model.{part}.intermediate_size", getattr(model, part).intermediate_size


def _experts(recipe: Recipe) -> Iterator[str]:
    """Expert ranks hold equally many experts."""
    expert = recipe.parallel.expert
    for part, moe in sparse_parts(recipe.model):
        if moe.num_experts % expert:
            yield (
                f"model.{part}.moe.num_experts={moe.num_experts} is not a multiple of parallel.expert={expert}; "
                f"expert sizes that fit: {divisors(moe.num_experts)}"
            )
        if recipe.parallel.precision == "bf16":
            yield from _aligned(recipe.model, part, moe.granularity, recipe.parallel.tensor)


def _aligned(model: Model, part: str, granularity: int, tensor: int) -> Iterator[str]:
    """torch's grouped_mm, an accelerator's product of experts, takes rows of whole 16 bytes: 8 numbers in bf16."""
    key, width = hidden_width(model, part)
    widths = {key: (width, max(granularity, 1) * tensor)}
    if part != "connector":
        widths[f"model.{part}.hidden_size"] = (getattr(model, part).hidden_size, 1)
    for name, (size, shares) in widths.items():
        if size % shares == 0 and size % (8 * shares):  # what cannot be shared at all is told elsewhere
            by = f"model.{part}.moe.granularity={granularity} x parallel.tensor={tensor} x " if shares > 1 else ""
            yield (
                f"{name}={size} is not a multiple of {by}8, as experts in bf16 need; {multiples(size, 8 * shares)}; "
                "or take precision=fp32"
            )


def _ranks(recipe: Recipe, world_size: int) -> Iterator[str]:
    """The layout on this number of ranks."""
    layout = recipe.parallel
    if world_size % layout.tensor:
        yield (
            f"{world_size} ranks are not a multiple of parallel.tensor={layout.tensor}; "
            f"{multiples(world_size, layout.tensor)}"
        )
        return
    size = world_size // layout.tensor
    ranks = f"data size {size} ({world_size} ranks / parallel.tensor={layout.tensor})"
    if size % layout.expert:
        yield f"parallel.expert={layout.expert} does not divide the {ranks}; expert sizes that fit: {divisors(size)}"
    yield from share_problems(recipe.data, size, ranks)


def lane_problems(data: Data) -> Iterator[str]:
    """The stream's lanes and the packs of a step, on any number of ranks."""
    if data.global_batch % data.num_lanes():
        yield (
            f"data.lanes={data.lanes} does not divide data.global_batch={data.global_batch}; "
            f"lanes that fit: {divisors(data.global_batch)}"
        )


def share_problems(data: Data, size: int, ranks: str) -> Iterator[str]:
    """What `size` data-parallel ranks cannot share evenly; `ranks` is them in words."""
    step = data.micro_batch * size
    if data.global_batch % step:
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch={data.micro_batch} x "
            f"{ranks} = {step}; {multiples(data.global_batch, step)}"
        )
    if data.num_lanes() % size:
        yield (
            f"the {ranks} does not divide the {data.num_lanes()} lanes of the stream (data.lanes, or else "
            f"data.global_batch); data sizes that fit: {divisors(data.num_lanes())}"
        )


def sparse_parts(model: Model) -> Iterator[tuple[str, Moe]]:
    """Name and experts of each part that has some."""
    for part in PARTS:
        moe = getattr(model, part).moe
        if moe.num_experts:
            yield part, moe


def divides(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    """A sentence unless `by` divides `value`."""
    if value % by:
        yield f"{key}={value} is not a multiple of {by_key}={by}; {multiples(value, by)}"


def multiples(value: int, of: int) -> str:
    """The nearest multiples around a value, in words."""
    low = value // of * of
    return f"the nearest are {low} and {low + of}" if low else f"the nearest is {of}"


def divisors(value: int) -> str:
    """The numbers that divide a value, in words; the first 16 of them."""
    found = [str(number) for number in range(1, value + 1) if value % number == 0]
    return ", ".join(found[:16]) + (", ..." if len(found) > 16 else "")
