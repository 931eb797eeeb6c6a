"""A training step through the engine against a bare PyTorch loop of the same model, side by side in one process.

    python -m tools.bench.step [RECIPE] [--pairs N] [--save]

Both sides run the same forward of the same VisionLanguageModel on the same packs. The bare loop is what one would write
in a notebook: zero_grad, forward, backward, clip_grad_norm_, AdamW.step. The engine adds collectives of one process,
norms by part, the sums of the step and DeepSpeed. Prints one JSON line; `ratio` is bare time / engine time (1 = free).
--save keeps it in tools/bench/results/.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from launch.entry import run, setup
from tools.bench.record import tell

DEFAULT = Path("configs/recipes/real/3_instruct.yaml")


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--pairs", type=int, default=12, help="measured pairs of steps")
    parser.add_argument("--save", action="store_true", help="keep the result in tools/bench/results/")
    arguments = parser.parse_args()
    from mmtrain.config.load import load

    overrides = ["parallel.zero_stage=1", "parallel.expert=1", "parallel.tensor=1", "init_from="]
    recipe = load(
        arguments.recipe, [*overrides, *(f"upcycle.{part}=null" for part in ("vision", "connector", "decoder"))]
    )
    from mmtrain.assemble import assemble
    from mmtrain.parallel.groups import connect

    groups = connect(recipe.parallel)
    built = assemble(recipe, groups)
    batch = synthetic(recipe)
    ours, bare = engine_step(recipe, groups, built.engine, batch), bare_step(recipe, batch)
    times: dict[str, list[float]] = {"engine": [], "bare": []}
    for number in range(arguments.pairs + 2):
        sides = [("engine", ours), ("bare", bare)]
        for name, step in sides if number % 2 else reversed(sides):
            start = time.perf_counter()
            step()
            if number >= 2:  # the first pairs warm up
                times[name].append(time.perf_counter() - start)
    ratios = [b / e for b, e in zip(times["bare"], times["engine"], strict=True)]
    result = {
        "bench": "step",
        "recipe": arguments.recipe.name,
        "tokens": batch.tokens.numel(),
        "images": len(batch.images),
        "engine_ms": round(1e3 * statistics.median(times["engine"]), 1),
        "bare_ms": round(1e3 * statistics.median(times["bare"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "target": 0.92,
        "threads": torch.get_num_threads(),
    }
    tell(result, arguments.save)
    groups.close()
    return 0


def synthetic(recipe):
    """One micro-batch that fills every pack: documents of one image and text."""
    from mmtrain.config.tokens import TokenKind
    from mmtrain.data.record import Batch

    length, per_image = recipe.data.sequence_length, recipe.model.connector.num_tokens
    packs, per_document = recipe.data.micro_batch, per_image + 32
    count = length // per_document
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, recipe.model.decoder.vocab_size, (packs, length), generator=draw)
    place = torch.arange(length)
    documents = torch.where(place < count * per_document, place // per_document, -1).expand(packs, -1)
    image = (place % per_document < per_image) & (documents[0] >= 0)
    kind = torch.where(image, TokenKind.IMAGE, TokenKind.TEXT).to(torch.uint8)
    kind[documents[0] < 0] = TokenKind.PADDING
    slots = torch.arange(packs * length).view(packs, length)[:, image].reshape(-1, per_image)
    weights = ((kind == TokenKind.TEXT) & (place % per_document < per_document - 1)).float().expand(packs, -1)
    return Batch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        weights=weights.contiguous(),
        document_ids=documents.contiguous(),
        positions=(place % per_document).expand(packs, -1).contiguous(),
        kind=kind.expand(packs, -1).contiguous(),
        source_ids=torch.zeros(packs, length, dtype=torch.int64),
        images=torch.randint(0, 255, (len(slots), 3, *recipe.model.vision.image_size), generator=draw).to(torch.uint8),
        image_valid=torch.ones(len(slots), dtype=torch.bool),
        image_slots=slots,
        keys=[[f"document {number}" for number in range(count)]] * packs,
        num_sources=1,
    )


def engine_step(recipe, groups, engine, batch) -> Callable[[], None]:
    """What mmtrain.train does in a step, without data and logs."""
    from mmtrain.config.schema import PARTS
    from mmtrain.data.record import Step
    from mmtrain.model.balance import RouterState
    from mmtrain.totals import LossTotals, StepSums

    routers = RouterState.first(recipe.model)
    valid = dict.fromkeys(PARTS, float(batch.tokens.numel()))
    data = Step([batch], float(batch.weights.sum()), valid, {}, {})

    def step() -> None:
        sums = StepSums.of(data, 0, groups, 1)
        losses = engine.forward(batch, routers.inputs(sums.label_weight, sums.valid_tokens))
        engine.backward(losses.total, last=True)
        totals = LossTotals(recipe.model)
        totals.add(losses)
        totals.reduce(groups)
        totals.loss()
        engine.norms()
        engine.step(1.0)
        routers.update(totals.by_part("counts"))

    return step


def bare_step(recipe, batch) -> Callable[[], None]:
    """The same model in plain PyTorch."""
    from mmtrain.config.schema import PARTS
    from mmtrain.model.stepio import first_inputs
    from mmtrain.model.vlm import VisionLanguageModel
    from mmtrain.mup.init import initialize
    from mmtrain.mup.registry import Registry

    model = VisionLanguageModel(recipe.model)
    initialize(model, Registry.build(model, model, recipe.mup), recipe.seed)
    optim = recipe.optim
    optimizer = torch.optim.AdamW(model.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, fused=True)
    valid = dict.fromkeys(PARTS, float(batch.tokens.numel()))
    inputs = first_inputs(recipe.model, float(batch.weights.sum()), valid)

    def step() -> None:
        optimizer.zero_grad()
        model(batch, inputs).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()

    return step


if __name__ == "__main__":
    run(main)
