"""The whole path on a laptop: real pictures -> shards -> three stages on two ranks -> evaluation -> answers.

    python -m tools.demo

Run it again after an interruption: what is done is not done again. Everything is written to runs/demo.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import rich
from rich.markup import escape
from rich.table import Table

from mmtrain.evaluate.overlap import overlap
from tools import demo_data

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/demo")
DATA = OUT / "data"
STAGES = ("1_align", "2_prefinetune", "3_instruct")
INPUTS = {
    "captions": ("captions", "captions.jsonl"),
    "interleaved": ("interleaved", "interleaved.jsonl"),
    "text": ("text", "text.jsonl"),
    "instruct": ("instruct", "instruct.json"),
    "eval_captions": ("captions", "eval/captions.jsonl"),
    "eval_instruct": ("instruct", "eval/instruct.json"),
}
"""Folder of shards -> format and input file of tools.make_shards."""
RANKS = "2"
VOCAB_SIZE = "512"
ANSWERS_SHOWN = 8


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.monotonic()
    memory = MemoryWatch()
    prepare()
    trained = time.monotonic()
    call("launch/stages.py", *(f"configs/recipes/demo/{stage}.yaml" for stage in STAGES), "--ranks", RANKS)
    report = evaluate()
    report["minutes"] = {
        "data": round((trained - started) / 60, 2),
        "all": round((time.monotonic() - started) / 60, 2),
    }
    report["peak_memory_gib"] = round(memory.stop() / 2**30, 2)
    (OUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def call(*command: str) -> None:
    """Run one of the project's own commands; end with its code if it fails."""
    words = [command[0]] if command[0].endswith(".py") else ["-m", command[0]]
    if code := subprocess.run([sys.executable, *words, *command[1:]], cwd=ROOT).returncode:
        raise SystemExit(code)


def prepare() -> None:
    """easy-VQA as raw files, a tokenizer, and shards of them; done once."""
    if DATA.exists():
        return
    raw, new = OUT / "raw", OUT / "data.tmp"
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(raw, ignore_errors=True)  # what an interrupted run left
    new.mkdir(parents=True)
    demo_data.build(raw)
    tokenizer = str(new / "tokenizer.json")
    texts = [str(raw / name) for name in ("captions.jsonl", "interleaved.jsonl", "text.jsonl", "instruct.json")]
    call("tools.train_tokenizer", *texts, "--vocab-size", VOCAB_SIZE, "--out", tokenizer)
    for folder, (kind, name) in INPUTS.items():
        images = ["--images", str(raw / "images")]
        call("tools.make_shards", kind, str(raw / name), *images, "--out", str(new / folder), "--tokenizer", tokenizer)
    new.rename(DATA)


def evaluate() -> dict[str, Any]:
    """Measure the last stage on easy-VQA's test images, with and without seeing them."""
    last, raw, images = str(OUT / STAGES[-1]), OUT / "raw", ["--images", str(OUT / "raw" / "images")]
    runs = {
        "vqa": ("vqa", "vqa.jsonl", []),
        "vqa_blank": ("vqa", "vqa.jsonl", ["--blank-images"]),
        "matching": ("matching", "matching.jsonl", []),
        "caption": ("caption", "captions.jsonl", []),
    }
    found = {}
    for name, (task, data, flags) in runs.items():
        file = OUT / f"eval_{name}.json"
        what = ["--task", task, "--data", str(raw / "eval" / data), *images, "--out", str(file), *flags]
        call("launch/evaluate.py", last, *what)
        found[name] = json.loads(file.read_text())
    shared = overlap(
        [DATA / folder for folder in INPUTS if not folder.startswith("eval")],
        raw / "eval" / "vqa.jsonl",
        raw / "images",
    )
    stages = {stage: json.loads((OUT / stage / "report.json").read_text()) for stage in STAGES}
    return {
        "accuracy": found["vqa"]["metrics"]["accuracy"],
        "accuracy_blank_images": found["vqa_blank"]["metrics"]["accuracy"],
        "evaluation": {name: result["metrics"] for name, result in found.items()},
        "evaluation_images_in_training": shared,
        "expert_shares": stages[STAGES[-1]]["expert_shares"],
        "rare_experts": stages[STAGES[-1]]["rare_experts"],
        "answers": found["vqa"]["items"][:: max(1, len(found["vqa"]["items"]) // ANSWERS_SHOWN)][:ANSWERS_SHOWN],
        "stages": stages,
    }


def show(report: dict[str, Any]) -> None:
    """What a person wants to see at the end."""
    answers = Table(title="Some of the test questions", title_justify="left")
    for column in ("image", "question", "answer", "right?"):
        answers.add_column(column)
    for item in report["answers"]:
        answers.add_row(item["image"], item["prompt"], escape(item["output"]), "yes" if item["correct"] else "no")
    rich.print(answers)
    numbers = Table(title="The demo in numbers", title_justify="left")
    numbers.add_column("what")
    numbers.add_column("value", justify="right")
    numbers.add_row("easy-VQA test accuracy", f"{report['accuracy']:.3f}")
    numbers.add_row("the same with every image blanked", f"{report['accuracy_blank_images']:.3f}")
    for name, value in report["evaluation"]["matching"].items():
        numbers.add_row(f"image-text matching, {name}", f"{value:.3f}" if isinstance(value, float) else str(value))
    numbers.add_row("evaluation images trained on", str(report["evaluation_images_in_training"]["shared"]))
    numbers.add_row("experts under 2%", ", ".join(report["rare_experts"]) or "none")
    numbers.add_row("peak memory of all processes", f"{report['peak_memory_gib']} GiB")
    numbers.add_row("minutes", str(report["minutes"]["all"]))
    rich.print(numbers)
    rich.print(
        f"Report: {OUT}/report.json   plots: {OUT}/*/plots   ask more: python launch/generate.py "
        f"{OUT}/{STAGES[-1]} --image FILE --prompt TEXT"
    )


class MemoryWatch:
    """Highest resident memory of this process and all below it together, looked at once a second."""

    def __init__(self) -> None:
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(1.0):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        """Bytes."""
        self._done.set()
        self._thread.join()
        return self._peak


if __name__ == "__main__":
    main()
