"""wandb and the profiler."""

import builtins
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Log
from mmtrain.parallel.environment import free_port
from mmtrain.run.profile import ProfileWindow
from mmtrain.run.wandb_log import WandbLog, flat


def test_disabled_does_not_even_import_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = WandbLog(Log(wandb="disabled"), "run", tmp_path, {})
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    load = builtins.__import__

    def refuse(name, *rest):
        if name == "wandb":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"log.wandb=offline: the package wandb is missing. `pip install wandb`"):
        WandbLog(Log(wandb="offline"), "run", tmp_path, {})


OFFLINE = """
    import sys
    from pathlib import Path
    from mmtrain.config.schema import Log
    from mmtrain.run.wandb_log import WandbLog
    for step in (1, 2):  # the second is a resumed run
        log = WandbLog(Log(wandb="offline"), "tiny", Path(sys.argv[1]), {"seed": 0})
        log.write(step, {"step": step, "loss": 1.0 / step, "loss_by_source": {"captions": None}})
        log.close()
"""


def test_offline_needs_no_account_and_keeps_its_id(tmp_path):
    root = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": root, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(OFFLINE), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    run_id = (tmp_path / "wandb_id").read_text()
    assert written and all(path.name == f"run-{run_id}.wandb" for path in written)


ONLINE = """
    import logging, sys, wandb
    from pathlib import Path
    from mmtrain.config.schema import Log
    from mmtrain.run.wandb_log import WandbLog
    logging.basicConfig()
    log = WandbLog(Log(wandb="online"), "tiny", Path(sys.argv[1]), {"seed": 0})
    print("limit", wandb.run.settings.finish_timeout)
    log.write(3, {"step": 3})
    log.close()
"""


def test_a_run_goes_on_offline_when_wandb_does_not_answer_but_does_not_begin_so(tmp_path):
    nobody = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"}
    environment = {**os.environ, **nobody, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(ONLINE), str(tmp_path)]

    def start():
        return subprocess.run(command, env=environment, cwd=tmp_path, timeout=200, capture_output=True, text=True)

    first = start()
    assert first.returncode and "ConfigError: log.wandb=online: " in first.stderr
    (tmp_path / "wandb_id").write_text("abc")
    again = start()
    assert again.returncode == 0 and "limit 60.0" in again.stdout, again.stderr
    assert "Going on offline; `wandb sync` sends what is kept" in again.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*/run-abc.wandb"))) == 1


def test_flat_names():
    values = {
        "step": 3,
        "loss_by_source": {"a": 1.0, "b": None},
        "experts": {"decoder": {"1": [0.25, 0.75]}},
        "skipped": "",
    }
    assert flat(values) == {
        "step": 3,
        "loss_by_source/a": 1.0,
        "experts/decoder/1/0": 0.25,
        "experts/decoder/1/1": 0.75,
    }


def test_the_trace_holds_the_steps_of_the_window(tmp_path):
    window = ProfileWindow("2:3", tmp_path, rank=1)
    for step in range(1, 6):
        with window.step(step):
            torch.ones(4) @ torch.ones(4)
    window.close()
    events = json.loads((tmp_path / "profile" / "rank_00001.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 2", "step 3", "aten::dot"} <= names and not {"step 1", "step 4"} & names


def test_a_stop_inside_the_window_still_writes(tmp_path):
    window = ProfileWindow("1:9", tmp_path)
    with window.step(1):
        torch.ones(1)
    window.close()
    assert window.path.exists()


@pytest.mark.parametrize("text", ["3", "5:3", "0:2", "a:b"])
def test_a_window_that_is_none(tmp_path, text):
    with pytest.raises(ConfigError, match=rf"--profile {text}: not a window of steps. Write FIRST:LAST"):
        ProfileWindow(text, tmp_path)
