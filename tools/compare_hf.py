"""A checkpoint against transformers: the same text from both, token by token, and the same perplexity.

    python -m tools.compare_hf CHECKPOINT HF_FOLDER [--text FILE.jsonl] [--tokens N] [--save NAME]

HF_FOLDER is where the checkpoint's decoder came from, or what it was exported to as a decoder; an upcycled checkpoint
without noise compares with the dense folder as well. --text: JSON lines with a key `text`. Prints one JSON line; 1 when
texts differ, or logits by more than 1e-4.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from launch.entry import positive, run, setup
from tools.bench.record import tell

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small fox who",
    "Question: Why is the sky blue?\nAnswer:",
    "def fibonacci(n):\n",
    "Water boils when",
)
NEW_TOKENS = 50
TOLERANCE = 1e-4  # absolute, of logits
CHUNK = 512


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, help="JSON lines whose perplexity both print")
    parser.add_argument("--tokens", type=positive, default=2 * CHUNK, help="tokens of the text to read")
    parser.add_argument("--save", default="", metavar="NAME", help="keep the line as tools/bench/results/NAME.json too")
    arguments = parser.parse_args()
    result = compare(arguments.checkpoint, arguments.folder, arguments.text, arguments.tokens)
    tell({"bench": arguments.save or "compare_hf", **result}, bool(arguments.save))
    return int(result["equal_continuations"] < len(PROMPTS) or result["largest_logit_difference"] > TOLERANCE)


def compare(checkpoint: Path, folder: Path, text: Path | None, count: int) -> dict[str, Any]:
    """Texts, logits and perplexities of both."""
    import torch
    from transformers import AutoModelForCausalLM

    from mmtrain.inference import open_inference

    ours = open_inference(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    result: dict[str, Any] = {"prompts": len(PROMPTS)}
    same = 0
    difference = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([ours.tokenizer.encode(prompt)])
        with torch.no_grad():
            wanted = theirs.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
            logits = theirs(wanted).logits
        got = _continue(ours, ids)
        same += got == wanted[0, ids.shape[1] :].tolist()
        mine = _logits(ours, wanted)[..., : logits.shape[-1]]
        difference = max(difference, float((mine - logits[..., : mine.shape[-1]]).abs().max()))
    result |= {"equal_continuations": same, "new_tokens": NEW_TOKENS, "largest_logit_difference": difference}
    if text is not None:
        rows = _rows(ours, text, count)
        with torch.no_grad():
            result["perplexity_transformers"] = _perplexity(rows, lambda ids: theirs(ids).logits)
        result["perplexity_mmtrain"] = _perplexity(rows, lambda ids: _logits(ours, ids))
        result["tokens"] = sum(len(row) - 1 for row in rows)
    return result


def _batch(ours: Any, ids: Any) -> Any:
    """Ids [1, T] as a batch without images."""
    import torch

    from mmtrain.data.batch import batch_documents
    from mmtrain.data.documents import document_of
    from mmtrain.data.record import Text

    tokens = ids[0].numpy().astype("int32")
    part = Text(tokens, (tokens * 0).astype(bool))
    batch = batch_documents([document_of("text", "text", [part], {})], ours.recipe, ours.tokenizer)
    assert torch.equal(batch.tokens, ids)
    return batch


def _logits(ours: Any, ids: Any) -> Any:
    """[1, T, V]."""
    import torch

    return ours.forward(_batch(ours, ids), torch.arange(ids.shape[1]), None).unsqueeze(0)


def _continue(ours: Any, ids: Any) -> list[int]:
    from mmtrain.evaluate.generate import generate

    return generate(ours.forward, _batch(ours, ids), ours.recipe.model.decoder.num_layers, (), NEW_TOKENS)[0]


def _rows(ours: Any, text: Path, count: int) -> list[list[int]]:
    """The first `count` tokens of the file's texts, in rows of CHUNK."""
    ids: list[int] = []
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            ids += ours.tokenizer.encode(json.loads(line)["text"])
            if len(ids) >= count:
                break
    return [ids[start : start + CHUNK] for start in range(0, min(count, len(ids)), CHUNK)]


def _perplexity(rows: list[list[int]], logits: Any) -> float:
    """exp of the mean cross-entropy of every token but a row's first."""
    import torch
    from torch.nn import functional as F

    total, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        total += float(F.cross_entropy(logits(ids)[0, :-1].double(), ids[0, 1:], reduction="sum"))
        tokens += len(row) - 1
    return math.exp(total / tokens)


if __name__ == "__main__":
    run(main)
