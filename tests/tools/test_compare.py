"""The tools that hold a checkpoint against what transformers makes of it, and the memory of a chain of stages."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from mmtrain.config.errors import DataError
from mmtrain.convert.export import export
from mmtrain.run.reader import open_weights
from tests.data.inputs import picture
from tests.evaluate import checkpoints
from tools import compare_answers
from tools.bench import stages


def test_answers_of_an_exported_model_are_compared(tmp_path: Path, monkeypatch, capsys) -> None:
    run, folder = checkpoints.random_checkpoint(tmp_path / "run"), tmp_path / "hf"
    export(open_weights(run), folder)
    (tmp_path / "picture.png").write_bytes(picture(40, 40, colour=(10, 200, 30)))
    words = ["compare", run, folder, "--image", tmp_path / "picture.png", "--prompt", "What is it?"]
    monkeypatch.setattr("sys.argv", [*map(str, words), "--max-new-tokens", "6"])
    assert compare_answers.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["equal"] and found["mmtrain"] == found["transformers"] and found["prompts"] == ["What is it?"]

    def other(*_: object) -> dict[str, object]:
        return {"answers": ["another"], "alone": True}

    monkeypatch.setattr(compare_answers, "_ask", other)
    assert compare_answers.main() == 1


def test_a_folder_that_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path} could not be asked by transformers: .+$"):
        compare_answers._ask(tmp_path, "picture.png", ["What?"], 2)


def test_the_memory_of_a_command_is_that_of_all_its_processes() -> None:
    hold = "import time; held = b'x' * (300 << 20); time.sleep(3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    seen, code = stages.peak_memory([sys.executable, "-c", parent], {"processes": 3})
    assert 0.29 < seen["peak_gib_all_processes"] < 0.5 and seen["processes"] == 3 and code == 0
    assert stages.peak_memory([sys.executable, "-c", parent], {})[0]["processes"] == 2
    assert stages.peak_memory([sys.executable, "-c", "raise SystemExit(3)"], {})[1] == 3


def test_a_process_that_has_ended_has_no_memory() -> None:
    process = psutil.Popen([sys.executable, "-c", ""])
    process.wait()
    assert stages.family(process) == [] and stages.resident(process) == (0, 0)
