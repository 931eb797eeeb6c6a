"""What a benchmark keeps of itself."""

import json
import sys
from pathlib import Path

import pytest

from tools.bench import record


def test_a_saved_result_says_what_was_measured_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", [str(record.ROOT / "tools" / "bench" / "step.py"), "a b.yaml", "--save"])
    record.tell({"bench": "step", "ratio": 0.5}, save=False)
    assert not (tmp_path / "results").exists()
    record.tell({"bench": "step", "ratio": 0.5}, save=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"bench": "step", "ratio": 0.5}] * 2
    kept = json.loads((tmp_path / "results" / "step.json").read_text())
    assert kept["command"] == "python -m tools.bench.step 'a b.yaml' --save" and kept["ratio"] == 0.5
    assert kept["hardware"]["cores"] >= 1 and kept["hardware"]["memory_gib"] > 0 and kept["hardware"]["processor"]
    assert str(tmp_path) not in (tmp_path / "results" / "step.json").read_text()


def test_the_commit_is_marked_where_files_differ_from_it() -> None:
    clean, _, dirty = record.commit().partition(", ")
    assert clean == "not a git checkout" or (len(clean) >= 12 and set(clean) <= set("0123456789abcdef"))
    assert dirty in ("", "with changes")
