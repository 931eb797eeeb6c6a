"""The plots and the report of a run."""

import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from mmtrain.run import report as report_module
from mmtrain.run.metrics import MetricsLog, StepRecord
from mmtrain.run.plots import _ratio, draw_plots
from mmtrain.run.report import Report, commit, table, write_report

ALL = ["loss.png", "lr.png", "grad_norm.png", "grad_ratio.png", "held_out.png", "experts.png"]


def records(**values):
    for step in range(1, 21):
        loss = 2 + math.exp(-step / 5)
        defaults = {
            "loss_by_source": {"captions": loss, "text": None if step % 3 else loss + 1},
            "part_norms": {"vision": 0.0, "decoder": 1 / step, "connector": 2 / step},
            "position_norms": {} if step == 7 else {"text": 1.0, "image": 0.1 * step},
            "held_out": {"captions": loss, "all": loss} if step % 5 == 0 else {},
            "expert_shares": {"vision": {"1": [0.5, 0.49, 0.01, 0.0]}, "decoder": {"0": [0.5, 0.5], "2": [0.9, 0.1]}},
            "skipped": "loss nan" if step == 7 else "",
        }
        yield StepRecord(
            step=step, loss=loss, language_loss=loss, grad_norm=loss, lr=1e-3 / step, **{**defaults, **values}
        )


def draw(folder, lines):
    log = MetricsLog(folder)
    for line in lines:
        log.write(line)
    log.close()
    return draw_plots(folder / "metrics.jsonl", folder / "plots", "align")


def test_every_plot_is_a_picture_with_something_on_it(tmp_path):
    paths = draw(tmp_path, records())
    assert [path.name for path in paths] == ALL
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        pixels = matplotlib.image.imread(path)[..., :3]
        assert (pixels < 0.9).any(-1).mean() > 0.005  # curves, not an empty page
        if path.name != "experts.png":
            assert pixels.shape[:2] == (495, 880)


def test_only_what_there_are_numbers_for(tmp_path):
    one_part = {"part_norms": {"connector": 1.0}, "position_norms": {"text": 0.0, "image": 1.0}}
    assert [path.name for path in draw(tmp_path, records(held_out={}, expert_shares={}, **one_part))] == ALL[:3]
    assert draw(tmp_path, []) == []


def test_a_run_of_nothing_but_nan_still_draws(tmp_path):
    nan = {"captions": math.nan}
    lines = [replace(line, language_loss=math.nan, grad_norm=math.nan, loss_by_source=nan) for line in records()]
    assert len(draw(tmp_path, lines)) == len(ALL)


def test_ratios_are_of_norms_that_are_there():
    record = {"position_norms": {"text": 2.0, "image": 1.0}, "part_norms": {"vision": None, "decoder": 1.0}}
    assert _ratio(record, "position_norms", "image", "text") == 0.5
    assert _ratio(record, "part_norms", "vision", "decoder") is None
    assert _ratio(record, "part_norms", "decoder", "vision") is None
    assert _ratio({"part_norms": {"a": 1.0, "b": 0.0}}, "part_norms", "a", "b") is None
    assert _ratio({}, "position_norms", "image", "text") is None


def test_many_experts_and_layers_fit(tmp_path):
    layers = {str(layer): [1 / 64] * 64 for layer in range(24)}
    *_, path = draw(tmp_path, records(expert_shares={"decoder": layers, "connector": {"0": [0.25] * 4}}))
    height, width = matplotlib.image.imread(path).shape[:2]
    assert height <= 1400 and width <= 1800


REPORT = Report(
    name="align",
    steps=100,
    tokens=12345,
    consumed={"captions": 50, "text": 7},
    skipped_samples={"captions": 2},
    final_losses={"captions": 1.5, "all": math.nan},
    skipped_steps=1,
    expert_shares={"decoder": {"3": [0.5, 0.496, 0.004]}},
    evaluation={"vqa": {"accuracy": 0.875, "answers": ["yes", "no"]}},
    timings={"total_seconds": 12.5},
    peak_memory_gib=1.25,
)


def test_the_report_names_experts_that_hardly_work(tmp_path):
    path = write_report(REPORT, tmp_path)
    written = json.loads(path.read_text())
    assert written["rare_experts"] == ["decoder layer 3 expert 2 (0.4%)"]
    assert written["final_losses"] == {"captions": 1.5, "all": None}
    assert written["evaluation"]["vqa"]["accuracy"] == 0.875
    assert {"python", "torch", "safetensors"} <= written["versions"].keys()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_table_shows_the_same():
    console = Console(width=100, file=None, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(table(REPORT))
    text = re.sub(r"[ │]+", " ", capture.get())
    for line in (
        "align: 100 steps, 12,345 tokens",
        "loss, captions 1.5000",
        "samples, captions 50 (2 unusable)",
        "vqa, accuracy 0.8750",
        "total seconds 12.50",
        "peak memory 1.25 GiB",
        "experts under 2% decoder layer 3 expert 2 (0.4%)",
    ):
        assert line in text
    assert "answers" not in text


@pytest.mark.parametrize("dirty", [False, True])
def test_the_commit_says_when_files_differ(tmp_path, monkeypatch, dirty):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    if dirty:
        (tmp_path / "file").write_text("2")
    monkeypatch.setattr(report_module, "__file__", str(tmp_path / "report.py"))
    assert re.fullmatch(r"[0-9a-f]{40}" + (r"\+changes" if dirty else ""), commit())


def test_no_git_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "__file__", str(tmp_path / "report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path(tmp_path).parent))
    assert commit() == ""
