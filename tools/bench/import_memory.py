"""Peak memory of reading a large public checkpoint: every tensor of a synthetic Llama, one at a time, in fp32.

    python -m tools.bench.import_memory [--billions 3] [--experts E] [--out FOLDER] [--save]

The shards are sparse files: they have their full length and take no room on a disk. With --out the checkpoint is
written as well, as `tools.convert hf-to-mm` does (4 bytes a parameter), and removed again. With --experts each MLP
becomes that many experts on the way (co-upcycling). Prints one JSON line.
"""

import argparse
import json
import resource
import shutil
import struct
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

from launch.entry import run, setup
from tools.bench.record import tell

WIDTH, HEADS, KV_HEADS, FFN, VOCAB = 3072, 24, 8, 8192, 128256  # Llama-3.2-3B's; its 28 layers give 3.2 billion
LAYERS_A_SHARD = 8


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=3.0, help="parameters, about")
    parser.add_argument("--experts", type=int, default=0, metavar="E", help="upcycle every MLP into E experts, top-2")
    parser.add_argument("--out", type=Path, help="new folder for the checkpoint")
    parser.add_argument("--save", action="store_true", help="keep the line in tools/bench/results too")
    arguments = parser.parse_args()
    per_layer = 2 * WIDTH * WIDTH * (HEADS + KV_HEADS) // HEADS + 3 * WIDTH * FFN
    layers = max(1, round((arguments.billions * 1e9 - VOCAB * WIDTH) / per_layer))
    with tempfile.TemporaryDirectory() as folder:
        size = synthetic(Path(folder), layers)
        result = measure(Path(folder), size, arguments.experts, arguments.out)
    tell({"bench": "import_memory", **result}, arguments.save)
    return 0


def synthetic(folder: Path, layers: int) -> int:
    """A tied bf16 Llama of zeros; returns its parameters."""
    head = WIDTH // HEADS
    config = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    block = {
        "self_attn.q_proj": (HEADS * head, WIDTH),
        "self_attn.k_proj": (KV_HEADS * head, WIDTH),
        "self_attn.v_proj": (KV_HEADS * head, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * head),
        "mlp.gate_proj": (FFN, WIDTH),
        "mlp.up_proj": (FFN, WIDTH),
        "mlp.down_proj": (WIDTH, FFN),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    shards = [tensors]
    for layer in range(layers):
        if layer % LAYERS_A_SHARD == 0:
            shards.append({})
        shards[-1] |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        total += _sparse_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def _sparse_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of zeros that takes no room; returns its elements."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset // 2


def measure(folder: Path, size: int, experts: int, out: Path | None) -> dict[str, Any]:
    """Make every tensor of the decoder, or write the checkpoint; memory of this process before and at its peak."""
    from mmtrain.assemble import blueprint
    from mmtrain.config.load import load
    from mmtrain.parallel.box import Box
    from mmtrain.run.comm import SingleProcess
    from mmtrain.run.manifest import RunState
    from mmtrain.run.saver import write_whole
    from mmtrain.weights import Weights, stored_shapes

    (folder / "recipe.yaml").write_text("name: import\nout: unused\n")
    tower = ["model.vision.num_layers=1", "model.vision.hidden_size=64", "model.vision.num_heads=1"]
    tower += ["model.vision.intermediate_size=64", "model.connector.hidden_size=64", "model.connector.depth=1"]
    if experts:
        tower += [f"model.decoder.moe.num_experts={experts}", "upcycle.decoder.noise=0"]
    recipe = load(folder / "recipe.yaml", [f"model.decoder.pretrained={folder}", *tower])
    _, registry = blueprint(recipe)
    before = _peak_gib()
    started = time.perf_counter()
    weights = Weights(recipe, registry, SingleProcess())
    tensors = ((name, weights.make(name, Box.whole(shape))) for name, shape in stored_shapes(registry).items())
    written = 0
    if out is None:
        for _ in tensors:
            pass
    else:
        made = write_whole(out, 0, tensors, RunState(0, "", {"world": 1}, registry.hash()), {})
        written = sum(path.stat().st_size for path in made.iterdir())
        shutil.rmtree(made)
    return {
        "parameters_read": size,
        "experts": experts,
        "gib_written": round(written / 2**30, 2),
        "gib_largest_tensor": round(max(4 * prod(entry.shape) for entry in registry.entries.values()) / 2**30, 2),
        "gib_before": before,
        "peak_gib": _peak_gib(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


if __name__ == "__main__":
    run(main)
