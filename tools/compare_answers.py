"""A checkpoint and what it was exported to: the same answers to questions about a picture.

    python -m tools.compare_answers CHECKPOINT HF_FOLDER --image FILE --prompt TEXT [--prompt TEXT ...] [--save NAME]

HF_FOLDER is what `tools.convert mm-to-hf --form own` wrote of CHECKPOINT; tools/ask_hf.py loads it in a process of its
own, with transformers alone. Prints one JSON line; 1 when an answer differs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.entry import positive, run, setup
from tools.bench.record import tell

ASK = Path(__file__).with_name("ask_hf.py")


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", required=True, help="picture to look at")
    parser.add_argument("--prompt", action="append", required=True, help="a question; each is asked by itself")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="tokens of an answer at most")
    parser.add_argument("--save", default="", metavar="NAME", help="keep the line as tools/bench/results/NAME.json too")
    arguments = parser.parse_args()
    result = compare(
        arguments.checkpoint, arguments.folder, arguments.image, arguments.prompt, arguments.max_new_tokens
    )
    tell({"bench": arguments.save or "compare_answers", **result}, bool(arguments.save))
    return int(not result["equal"])


def compare(checkpoint: Path, folder: Path, image: str, prompts: list[str], count: int) -> dict[str, Any]:
    """Both models' answers. DataError: transformers could not load the folder."""
    from mmtrain.evaluate.prompts import Prompter
    from mmtrain.evaluate.tasks import Evaluator
    from mmtrain.inference import open_inference

    theirs = _ask(folder, image, prompts, count)
    opened = open_inference(checkpoint)
    evaluator = Evaluator(Prompter(opened.recipe, opened.tokenizer), opened.forward, max_new_tokens=count)
    ours = [evaluator.answer(prompt, image).strip() for prompt in prompts]
    same = ours == theirs["answers"]
    return {"prompts": prompts, "mmtrain": ours, "transformers": theirs["answers"], "equal": same and theirs["alone"]}


def _ask(folder: Path, image: str, prompts: list[str], count: int) -> dict[str, Any]:
    from mmtrain.config.errors import DataError

    command = [sys.executable, str(ASK), str(folder), "--image", image, "--max-new-tokens", str(count)]
    command += [word for prompt in prompts for word in ("--prompt", prompt)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise DataError(f"{folder} could not be asked by transformers: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run(main)
