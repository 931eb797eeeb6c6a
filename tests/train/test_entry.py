"""Entry points: a person's mistake is exit code 2, one line that begins with error:, and no traceback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.load import dump
from mmtrain.config.schema import Decoder, Eval, Recipe, Source
from mmtrain.data.index import SUFFIX
from mmtrain.data.tokenizer import train_bpe
from mmtrain.run.retain import committed
from tests.train import jobs, tasks

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Recipe]


def write(recipe: Recipe, path: Path) -> str:
    """A recipe as a file."""
    path.write_text(dump(recipe))
    return str(path)


@pytest.fixture
def file(make: Make, tmp_path: Path) -> str:
    """A good recipe."""
    return write(make(tmp_path / "run"), tmp_path / "recipe.yaml")


def assert_one_error(ended: jobs.Ended, *texts: str) -> None:
    """The contract of a mistake."""
    assert ended.code == 2, ended.log
    assert [line[:7] for line in ended.log.splitlines() if "error" in line[:7].lower()] == ["error: "], ended.log
    assert "Traceback" not in ended.log
    for text in texts:
        assert text in ended.log


def train(tmp_path: Path, *arguments: str) -> jobs.Ended:
    """launch/train.py."""
    return jobs.run(tmp_path / "log", tasks.command, "train", list(arguments))


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["optim.lrr=1"], ["optim.lrr: unknown key", "lr"]),
        (["steps=many", "optim.name=adam"], ["steps: 'many' is not a whole number", "optim.name: 'adam'", "adamw"]),
        (["parallel.tensor=3"], ["cannot run on 1 rank", "parallel.tensor=3", "tensor sizes that fit: 1, 2, 4"]),
        (["parallel.expert=2"], ["parallel.expert=2 does not divide the data size 1"]),
        (["data.sources.text.shards=no/where"], ["data folder no/where: no such folder", "tools.make_shards"]),
        (["model.decoder.vocab_size=99"], ["model.decoder.vocab_size=99: tokenizer ", "set model.decoder.vocab_size="]),
        (["init_from=no/such/run"], ["no/such/run: no such folder"]),
    ],
    ids=["unknown key", "wrong types", "layout", "world size", "no data", "vocabulary", "no checkpoint"],
)
def test_a_wrong_value(file: str, tmp_path: Path, overrides: list[str], texts: list[str]) -> None:
    assert_one_error(train(tmp_path, file, *overrides), *texts)


def test_a_world_that_does_not_share_the_batch(make: Make, tmp_path: Path) -> None:
    file = write(make(tmp_path / "run"), tmp_path / "recipe.yaml")
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = jobs.Job(tmp_path / "log", tasks.command, "train", [file], env=place).end()
    assert_one_error(ended, "cannot run on 3 ranks", "data.global_batch=4", "data sizes that fit: 1, 2, 4")


def test_a_shard_without_index(file: str, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "text", tmp_path / "text")
    next((tmp_path / "text").glob("*" + SUFFIX)).unlink()
    ended = train(tmp_path, file, f"data.sources.text.shards={tmp_path / 'text'}")
    assert_one_error(ended, "shard-000000", "no index beside it", "tools.make_shards wds")


def test_a_tokenizer_that_the_shards_do_not_know(file: str, tmp_path: Path) -> None:
    other = train_bpe(["some other words entirely"] * 3, 300, tmp_path / "tokenizer.json")
    ended = train(tmp_path, file, f"data.tokenizer={other}")
    assert_one_error(ended, "indexed for tokenizer", "the recipe's is", "correct data.tokenizer")


def test_a_port_in_use(file: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = jobs.Job(tmp_path / "log", tasks.command, "train", [file], env=place).end()
    assert_one_error(ended, f"port {port} on 127.0.0.1 is in use", "--master_port")


@pytest.mark.parametrize("package", ["deepspeed", "omegaconf"])
def test_a_missing_package(file: str, tmp_path: Path, package: str) -> None:
    """omegaconf: a plain start in a bare environment, which must fail before it imports anything large."""
    if package == "deepspeed":
        ended = jobs.run(tmp_path / "log", tasks.command_without, package, [file])
    else:
        stubs = tmp_path / "stubs"
        stubs.mkdir()
        for name in ("omegaconf", "torch"):
            (stubs / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n")
        command = [sys.executable, str(ROOT / "launch" / "train.py"), file]
        environment = {**os.environ, "PYTHONPATH": str(stubs)}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        ended = jobs.Ended(done.returncode, None, done.stdout + done.stderr)
    assert_one_error(ended, f"the package {package} is missing: pip install -r requirements.txt")


def test_print_says_where_every_value_comes_from(make: Make, tmp_path: Path) -> None:
    file = write(make(tmp_path / "run"), tmp_path / "recipe.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("base: recipe.yaml\noptim: {lr: 0.5}\n")
    ended = train(tmp_path, str(child), "steps=9", "--print", "--local_rank=0")
    assert ended.code == 0
    rows = {line.split()[0]: line for line in ended.log.splitlines() if line}
    assert rows["optim.lr"].split()[1] == "0.5" and rows["optim.lr"].endswith("child.yaml")
    assert rows["steps"].split()[1] == "9" and rows["steps"].endswith("command line")
    assert rows["optim.clip"].endswith(Path(file).name)
    assert not (tmp_path / "run").exists()


def test_check_stops_after_a_step_of_data(file: str, tmp_path: Path) -> None:
    ended = train(tmp_path, file, "--check")
    assert ended.code == 0 and "every check passed; a step holds" in ended.log, ended.log
    assert not committed(tmp_path / "run") and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(tmp_path, file, "steps=1").code == 0
    again = train(tmp_path, file, "steps=1", "--check")
    assert again.code == 0 and "all 1 steps are done" in again.log, again.log


def test_check_for_ranks_that_are_not_there(file: str, tmp_path: Path) -> None:
    ended = train(tmp_path, file, "--check", "--ranks", "2", "parallel.expert=2")
    assert ended.code == 0, ended.log
    assert "recipe, tokenizer and shards pass for 2 ranks = 2 data x 1 tensor, 2 expert, ZeRO-1" in ended.log
    assert "a step of 4 packs of 80 positions is 2 micro-batches of 1 on each data rank" in ended.log
    assert not (tmp_path / "run").exists()
    assert_one_error(train(tmp_path, file, "--check", "--ranks", "3"), "cannot run on 3 ranks", "data.global_batch=4")
    assert_one_error(train(tmp_path, file, "--ranks", "2"), "--ranks belongs to --check")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("window", "steps"), [("2:2", {2}), ("3:9", {3})], ids=["inside", "cut short"])
def test_profile_writes_a_trace(file: str, tmp_path: Path, window: str, steps: set[int]) -> None:
    ended = train(tmp_path, file, "steps=3", "--profile", window)
    assert ended.code == 0, ended.log
    events = json.loads((tmp_path / "run" / "profile" / "rank_00000.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {number for number in range(1, 5) if f"step {number}" in names} == steps


def test_a_profile_window_that_is_none_is_told_first(file: str, tmp_path: Path) -> None:
    ended = train(tmp_path, file, "--profile", "5:3")
    assert_one_error(ended, "--profile 5:3: not a window of steps")
    assert not (tmp_path / "run").exists()


def test_stages_refuse_a_broken_chain(make: Make, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two", init_from=str(tmp_path / "elsewhere"))
    files = [write(one, tmp_path / "1.yaml"), write(two, tmp_path / "2.yaml")]
    ended = jobs.run(tmp_path / "log", tasks.command, "stages", files)
    assert_one_error(ended, "2.yaml: init_from=", f"the stage before it writes to {one.out}")
    assert "== stage 1" not in ended.log
    same = write(make(tmp_path / "one", init_from=one.out), tmp_path / "3.yaml")
    ended = jobs.run(tmp_path / "log", tasks.command, "stages", [files[0], same])
    assert_one_error(ended, "is also the folder of the stage before it")


@pytest.mark.parametrize(
    ("changes", "start", "texts"),
    [
        ({"steps": 0}, ["--launcher", "false"], ["recipe two cannot run: steps=0 and epochs=0"]),
        ({}, ["--ranks", "3"], ["recipe one cannot run on 3 ranks", "data.global_batch=4"]),
        ({"data": ("sources", {"text": Source("no/where", 1.0)})}, [], ["data folder no/where: no such folder"]),
        ({"model": ("decoder", Decoder(vocab_size=99))}, [], ["model.decoder.vocab_size=99: tokenizer"]),
        ({"eval": Eval(1, {"new": Source("not/there", 1.0)})}, [], ["data folder not/there: no such folder"]),
    ],
    ids=["recipe", "ranks", "shards", "vocabulary", "held-out shards"],
)
def test_a_later_stage_that_cannot_run_is_told_first(
    make: Make, tmp_path: Path, changes: dict[str, Any], start: list[str], texts: list[str]
) -> None:
    one = make(tmp_path / "one")
    for key, change in changes.items():
        if isinstance(change, tuple):
            changes = {**changes, key: replace(getattr(one, key), **dict([change]))}
    two = make(tmp_path / "two", init_from=one.out, **changes)
    files = [write(one, tmp_path / "1.yaml"), write(two, tmp_path / "2.yaml")]
    ended = jobs.run(tmp_path / "log", tasks.command, "stages", [*files, *start])
    assert_one_error(ended, *texts)
    assert "== stage 1" not in ended.log and not (tmp_path / "one").exists()


def test_stages_start_one_after_another_and_stop_at_a_failure(make: Make, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two", init_from=str(tmp_path / "one"))
    files = [write(one, tmp_path / "1.yaml"), write(two, tmp_path / "2.yaml")]
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import sys\nprint('started', *sys.argv[2:], flush=True)\nsys.exit(sys.argv[2].endswith('2.yaml') * 75)\n"
    )
    ended = jobs.run(
        tmp_path / "log", tasks.command, "stages", [*files, "steps=7", "--launcher", f"{sys.executable} {fake}"]
    )
    assert ended.code == 75 and ended.log.count("started") == 2, ended.log
    assert f"started {files[0]} steps=7" in ended.log and "ended with code 75" in ended.log
