"""What tensor ranks run in the tests: a module that other processes can import."""

from pathlib import Path
from typing import Any

from mmtrain.evaluate.prompts import Prompter
from mmtrain.evaluate.tasks import Evaluator
from mmtrain.inference import open_inference


def everything(checkpoint: Path, folder: Path, tensor: int) -> list[Any]:
    """Items and metrics of all three tasks."""
    opened = open_inference(checkpoint, tensor)
    prompter = Prompter(opened.recipe, opened.tokenizer, folder / "images")
    evaluator = Evaluator(prompter, opened.forward, batch_size=4, max_new_tokens=6)
    out = [getattr(evaluator, task)(folder / f"{file}.jsonl")[:2] for task, file in TASKS.items()]
    opened.close()
    return out


TASKS = {"vqa": "vqa", "matching": "matching", "caption": "captions"}
