"""metrics.jsonl, the meter, and what a person sees."""

import errno
import io
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from mmtrain.run import metrics, progress
from mmtrain.run.flops import peak_flops, peak_of
from mmtrain.run.metrics import Meter, MetricsLog, Rates, StepLines, StepRecord, each_record, read_metrics
from mmtrain.run.progress import ProgressLog


def record(step, **values):
    loss = 5.0 / step
    defaults = {"loss": loss, "language_loss": loss, "loss_by_source": {"captions": loss}, "grad_norm": 1.0, "lr": 1e-3}
    return StepRecord(step=step, **{**defaults, **values})


def test_a_line_holds_what_was_measured(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(record(1, held_out={"all": 2.0}, rates=Rates(tokens_per_second=12.0, seconds={"forward": 0.5})))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")  # before close: a kill loses nothing
    assert line["step"] == 1 and line["held_out"] == {"all": 2.0} and line["lr"] == 1e-3
    assert line["tokens_per_second"] == 12.0 and line["seconds"] == {"forward": 0.5} and line["mfu"] is None
    log.close()


def test_numbers_that_json_cannot_say_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(record(1, loss=float("nan"), part_norms={"vision": float("inf")}, expert_shares={"decoder": {1: [0.5]}}))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    line = json.loads(text)
    assert line["loss"] is None and line["part_norms"] == {"vision": None}
    assert line["expert_shares"] == {"decoder": {"1": [0.5]}}


def test_resume_gives_the_curve_of_an_undisturbed_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed, killed = MetricsLog(tmp_path / "a"), MetricsLog(tmp_path / "b")
    for step in range(1, 11):
        undisturbed.write(record(step))
    for step in range(1, 8):
        killed.write(record(step))
    undisturbed.close()
    killed.close()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    assert [line["step"] for line in read_metrics(tmp_path / "b" / "metrics.jsonl")] == list(range(1, 8))
    resumed = MetricsLog(tmp_path / "b", done=4)  # the newest good checkpoint was step 4
    for step in range(5, 11):
        resumed.write(record(step))
    resumed.close()
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == (tmp_path / "a" / "metrics.jsonl").read_text()


def test_lines_wait_for_a_disk_that_is_full(tmp_path, caplog):
    lines = StepLines(tmp_path / "lines.jsonl")
    disk, room = lines._file, 20

    def write(data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = disk.write(data[:room])
        room -= taken
        return taken

    lines._file = SimpleNamespace(write=write, close=disk.close)
    for step in (1, 2, 3):
        lines.write({"step": step})
    assert "lines.jsonl cannot be written: [Errno 28] No space left on device. 4 bytes wait for room." in caplog.text
    room = 1000
    lines.write({"step": 4})
    assert [line["step"] for line in read_metrics(lines.path)] == [1, 2, 3, 4]
    room = 0
    lines.write({"step": 5})
    lines.close()  # they are lost, and that was said
    assert [line["step"] for line in read_metrics(lines.path)] == [1, 2, 3, 4]


def test_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"st\n')
    lines = each_record(path)
    assert next(lines) == {"step": 1}
    with path.open("a") as file:
        file.write('{"step": 3}\n')
    assert list(lines) == [{"step": 3}]


def test_a_run_that_starts_over_drops_all_lines(tmp_path):
    for _ in range(2):
        log = MetricsLog(tmp_path)
        log.write(record(1))
        log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


class Clock:
    """A time that only moves when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


def test_the_meter_means_over_steps(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    meter = Meter(torch.device("cpu"), peak_flops=1000.0)
    for _ in range(4):
        with meter.phase("data_wait"):
            clock.now += 0.25
        with meter.phase("forward"):
            clock.now += 1.0
        with meter.phase("backward"):
            clock.now += 0.5
        with meter.phase("update"):
            clock.now += 0.25
        meter.count(tokens=100, images=3, flops=500.0)
    with meter.paused():
        clock.now += 1000.0  # an evaluation
    rates = meter.rates()
    assert rates.seconds == {"data_wait": 0.25, "forward": 1.0, "backward": 0.5, "update": 0.25}
    assert rates.step_seconds == 2.0 and rates.tokens_per_second == 50.0 and rates.images_per_second == 1.5
    assert rates.mfu == 2000.0 / 8.0 / 1000.0
    assert rates.peak_memory_gib > 0.05  # this process holds torch
    clock.now += 1.0
    meter.count(tokens=7, images=0)
    assert meter.rates().tokens_per_second == 7.0  # the window starts anew


def test_peaks():
    assert peak_flops(torch.device("cpu"), 8) is None
    assert peak_of("NVIDIA H100 80GB HBM3", 8) == 8 * 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("Radeon") is None


def test_lines_where_there_is_no_terminal(monkeypatch):
    clock = iter([0.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    log = ProgressLog("align", total_steps=40, done=5, stream=stream)
    log.update(20)
    rates = Rates(tokens_per_second=12345.6, images_per_second=7.25, mfu=0.412)
    log.report(record(20, held_out={"all": 1.5}, rates=rates, skipped="loss nan [not markup]"))
    log.close()
    assert stream.getvalue() == (
        "align  step 20/40  loss 0.2500  held-out 1.5000  norm 1  12,346 tokens/s  7.2 images/s  MFU 41.2%  "
        "SKIPPED: loss nan [not markup]  ETA 0:00:40\n"
    )


def test_a_bar_in_a_terminal(monkeypatch):
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=200, highlight=False, soft_wrap=True)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    log = ProgressLog("align", total_steps=40, stream=stream)
    log.report(record(20, rates=Rates(tokens_per_second=1000.0)))
    log.update(40)
    log.close()
    shown = stream.getvalue()
    assert "40/40" in shown and "loss 0.2500" in shown and "1,000 tokens/s" in shown and "ETA" in shown


def test_a_phase_that_raises_is_counted():
    meter = Meter(torch.device("cpu"))
    with pytest.raises(RuntimeError), meter.phase("forward"):
        time.sleep(0.001)
        raise RuntimeError
    assert meter.rates().seconds["forward"] > 0


def test_a_damaged_line_is_left_out_and_told(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\n[3]\n{"step": 4}\n{"step": 5}\n{"step"')
    assert [line["step"] for line in read_metrics(path)] == [1, 4, 5]
    lines = [record.message for record in caplog.records]
    assert [line.partition(": ")[2] for line in lines] == [
        f"line {number} is damaged and left out: {text!r}" for number, text in ((2, b'{"st\xff\n'), (3, b"[3]\n"))
    ]
    MetricsLog(tmp_path, done=4).close()
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'
