"""Measure a checkpoint.

    python launch/evaluate.py CHECKPOINT --task vqa --data F.jsonl --images DIR --out F.json         one process
    torchrun --nproc-per-node 2 launch/evaluate.py CHECKPOINT --tensor 2 ...                         tensor ranks

CHECKPOINT is a step folder, or a run folder: then its newest good checkpoint. The lines of --data are
    vqa       question_id, image, question, answers (1 to 3: alternatives; more: annotators' votes)
    matching  id, image, statement, label (true or false)
    caption   image, caption
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launchers start this file from anywhere

from launch.entry import positive, run, setup

if TYPE_CHECKING:
    from mmtrain.evaluate.tasks import Outcome
    from mmtrain.inference import Inference

TASKS = ("vqa", "matching", "caption")


def main() -> int:
    setup()
    from mmtrain.config.load import without_launcher_flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines")
    parser.add_argument("--images", type=Path, required=True, help="folder that the image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int, default=0, help="lines to use, from the first; 0: all")
    parser.add_argument("--batch-size", type=positive, default=64, help="prompts in a batch")
    parser.add_argument("--max-new-tokens", type=positive, default=32, help="tokens of an answer at most")
    parser.add_argument("--blank-images", action="store_true", help="replace every picture by a grey one")
    parser.add_argument("--tensor", type=positive, default=1, help="processes that share the model")
    return evaluate(parser.parse_args(without_launcher_flags(sys.argv[1:])))


def evaluate(arguments: argparse.Namespace) -> int:
    """Open, ask, write, show."""
    from rich.progress import track

    from mmtrain.evaluate.prompts import Prompter
    from mmtrain.evaluate.tasks import Evaluator
    from mmtrain.inference import open_inference

    started = time.monotonic()
    check_out(arguments.out)
    opened = open_inference(arguments.checkpoint, arguments.tensor)
    prompter = Prompter(opened.recipe, opened.tokenizer, arguments.images, arguments.blank_images)
    evaluator = Evaluator(
        prompter,
        opened.forward,
        arguments.batch_size,
        arguments.max_new_tokens,
        lambda chunks: track(chunks, arguments.task, disable=opened.rank > 0, transient=True),
    )
    outcome = getattr(evaluator, arguments.task)(arguments.data, arguments.limit)
    if opened.rank == 0:
        report = as_json(arguments, opened, outcome, time.monotonic() - started)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        show(report, arguments.out)
    opened.close()
    return 0


def check_out(out: Path) -> None:
    """Make the folder of `out`; ConfigError, before any work, where the file could not be written at its end."""
    from mmtrain.config.errors import ConfigError

    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, e.g. {out / 'report.json'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}; name a file in another folder") from None


def as_json(arguments: argparse.Namespace, opened: "Inference", outcome: "Outcome", seconds: float) -> dict[str, Any]:
    """What is written: everything that the numbers depend on, the numbers, and every item."""
    from mmtrain.evaluate.prompts import BLANK

    recipe = opened.recipe
    return {
        "task": arguments.task,
        "checkpoint": str(opened.folder),
        "step": opened.step,
        "data": str(arguments.data),
        "images": str(arguments.images),
        "count": len(outcome.items),
        "metrics": outcome.metrics,
        "prompt": {
            "wording": outcome.wording,
            "chat_template": recipe.data.chat_template,
            "example": outcome.example,
        },
        "image": {
            "size": list(recipe.model.vision.image_size),
            "resize": recipe.data.resize,
            "sub_images": recipe.data.sub_images,
            "blank": list(BLANK) if arguments.blank_images else None,
        },
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size,
        "seconds": round(seconds, 2),
        "items": outcome.items,
    }


def show(report: dict[str, Any], out: Path) -> None:
    """The numbers as a table."""
    import rich
    from rich.table import Table

    blank = report["image"]["blank"]
    seen = f", every picture blank (RGB {blank})" if blank else ""
    rich.print(f"{report['task']} on {report['data']}{seen}")
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report["metrics"].items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    rich.print(table)
    rich.print(f"{report['checkpoint']}, {report['seconds']:.1f} s, every answer in {out}")


if __name__ == "__main__":
    run(main)
