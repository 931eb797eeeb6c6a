"""A tiny stage on tiny shards of all four kinds, and what two runs of it have in common."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmtrain.config.schema import (
    Checkpoint,
    Connector,
    Data,
    Decoder,
    Eval,
    Log,
    Model,
    Moe,
    Mup,
    Optim,
    Recipe,
    Source,
    Vision,
)
from mmtrain.data.index import Shard, open_folder, read_index
from mmtrain.data.record import IndexEntry
from mmtrain.data.tokenizer import Tokenizer
from mmtrain.run.metrics import PHASES, Rates, read_metrics
from mmtrain.run.reader import Reader, open_checkpoint
from mmtrain.run.retain import committed
from tests.data.inputs import TEXTS, picture, question, tokenizer, write_lines
from tools.make_shards import make_shards

KINDS = ("captions", "interleaved", "text", "instruct")
DENSE = Moe()
SPARSE = Moe(num_experts=4, top_k=2, balance_coef=0.1, z_coef=0.01)
BASE = {"decoder": {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 24}}


def write_shards(folder: Path, tokenizer: Tokenizer) -> None:
    """Raw files in the public formats, then shards of each in folder/KIND."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    sizes = ((16, 16), (40, 10), (9, 21), (64, 48))
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        (raw / name).write_bytes(picture(*sizes[number % 4], colour=(20 * number, 255 - 20 * number, 99)))
    captions = [{"image": names[n % 12], "caption": f"a {n % 5} shape, {TEXTS[n % 4][: 9 + n]}"} for n in range(30)]
    books = [
        {"id": f"b{n}", "images": [names[n], None, names[n + 1], None], "texts": [None, f"one {n}", None, TEXTS[n % 4]]}
        for n in range(10)
    ]
    texts = [{"text": f"{n} {TEXTS[n % 4]}"} for n in range(16)]
    talks = [
        {"id": f"i{n}", "image": names[n], "conversations": question("<image>\nWhat?", f"{n}") + question("No?", "yes")}
        for n in range(12)
    ]
    write_lines(raw / "captions.jsonl", captions)
    write_lines(raw / "interleaved.jsonl", books)
    write_lines(raw / "text.jsonl", texts)
    (raw / "instruct.json").write_text(json.dumps(talks))
    for kind in KINDS:
        source = next(raw.glob(f"{kind}.json*"))
        make_shards(kind, source, raw, folder / kind, tokenizer, samples_per_shard=7)


def model(vision: Moe = DENSE, connector: Moe = DENSE, decoder: Moe = DENSE) -> Model:
    """Two towers of a few thousand values."""
    return Model(
        vision=Vision(
            image_size=(16, 16),
            patch_size=8,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=32,
            moe=vision,
        ),
        connector=Connector(kind="avg_pool", num_tokens=4, hidden_size=16, depth=1, num_heads=2, moe=connector),
        decoder=Decoder(
            vocab_size=400,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
            moe=decoder,
        ),
    )


def sparse_model() -> Model:
    """Experts everywhere; in the vision encoder in every 2nd layer, in the decoder balanced by the loss-free bias."""
    return model(replace(SPARSE, every=2), SPARSE, replace(SPARSE, balance="bias", bias_rate=0.01))


def recipe(shards: Path, out: Path, tokenizer: Tokenizer, **changes: Any) -> Recipe:
    """A dense stage; `changes` are fields of the recipe."""
    weights = zip(KINDS, (3.0, 2.0, 1.0, 4.0), strict=True)
    stage = Recipe(
        name=out.name,
        out=str(out),
        steps=4,
        model=model(),
        data=Data(
            sources={kind: Source(str(shards / kind), weight) for kind, weight in weights},
            tokenizer=str(tokenizer.path),
            sequence_length=80,
            max_images=4,
            global_batch=4,
            micro_batch=1,
            window=16,
            workers=0,
        ),
        optim=Optim(lr=3e-3, warmup_steps=0, weight_decay=0.1, clip=0.3),
        mup=Mup(base=BASE, embedding=4.0),
        checkpoint=Checkpoint(every=100),
        log=Log(every=1),
    )
    return replace(stage, **changes)


def corrupt_captions(shards: Path, folder: Path) -> tuple[Source, IndexEntry, Shard]:
    """A copy of the captions, one image with a broken body: the index knows only headers, so decoding finds it."""
    shutil.copytree(shards / "captions", folder / "captions")
    shard = open_folder(folder / "captions", tokenizer())[0]
    entry = read_index(shard.index).entries[1]
    member = next(member for member in entry.members if member.suffix == "png")
    with Path(shard.path).open("r+b") as file:
        file.seek(member.offset + 45)  # behind signature, IHDR and the head of IDAT
        file.write(bytes(max(member.size - 60, 8)))
    return Source(str(folder / "captions")), entry, shard


def measured(recipe: Recipe, every: int) -> Recipe:
    """`recipe` with held-out losses of its captions and text."""
    sources = {kind: recipe.data.sources[kind] for kind in ("captions", "text")}
    return replace(recipe, eval=Eval(every=every, sources=sources, batches=2))


def with_workers(recipe: Recipe, workers: int) -> Recipe:
    """`recipe` with decoding processes."""
    return replace(recipe, data=replace(recipe.data, workers=workers))


def curve(recipe: Recipe) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what a clock or the memory says."""
    drop = {*Rates.__dataclass_fields__, *PHASES}
    lines = read_metrics(Path(recipe.out) / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in drop} for line in lines]


def last(recipe: Recipe) -> Reader:
    """The newest checkpoint of a run."""
    return open_checkpoint(list(committed(Path(recipe.out)).values())[-1])


def tensors(reader: Reader, kinds: tuple[str, ...] = ("param",)) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, name) -> values, for what the checkpoint holds."""
    return {(kind, name): reader.read(name, kind) for kind in kinds for name in reader.names(kind)}


def assert_same_end(one: Recipe, other: Recipe) -> None:
    """Parameters, moments, router state and place in the stream of two runs, to the bit."""
    a, b = last(one), last(other)
    assert a.manifest.step == b.manifest.step
    for field in ("cursor", "routers", "guard", "optimizer_steps", "metrics"):
        assert getattr(a.manifest.state, field) == getattr(b.manifest.state, field), field
    kinds = ("param", "exp_avg", "exp_avg_sq")
    first, second = tensors(a, kinds), tensors(b, kinds)
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different
