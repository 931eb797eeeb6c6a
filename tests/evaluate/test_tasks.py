"""Whole evaluations from a checkpoint, in one process and on tensor ranks, and the commands around them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import evaluate, generate
from mmtrain.config.errors import CheckpointError, ConfigError
from mmtrain.evaluate.prompts import BLANK, Prompter
from mmtrain.evaluate.tasks import Evaluator
from mmtrain.inference import open_inference
from tests import dist
from tests.evaluate import checkpoints, ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with a checkpoint, images/, and a file for each task."""
    place = tmp_path_factory.mktemp("evaluate")
    checkpoints.random_checkpoint(place / "run")
    checkpoints.pictures(place / "images")
    for write in (checkpoints.questions, checkpoints.statements, checkpoints.captions):
        write(place)
    return place


def close(mine: Any, other: Any) -> None:
    """Equal but for rounding."""
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            close(mine[key], other[key])
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            close(a, b)
    else:
        assert mine == (pytest.approx(other, abs=1e-4) if isinstance(mine, float) else other)


def test_a_checkpoint_gives_back_the_model(folder: Path) -> None:
    opened = open_inference(folder / "run")
    assert (opened.step, opened.folder.name) == (7, "step_00000007")
    recipe = checkpoints.recipe()
    own, built = checkpoints.random_model(recipe).state_dict(), opened._model.state_dict()
    assert all(torch.equal(own[name], built[name]) for name in own) and own.keys() == built.keys()
    assert opened._model.decoder.head.scale == checkpoints.random_model(recipe).decoder.head.scale != 1.0


def test_two_tensor_ranks_answer_as_one_process(folder: Path) -> None:
    alone = ranks.everything(folder / "run", folder, 1)
    first, second = dist.run(ranks.everything, 2, folder / "run", folder, 2, limit=240.0)
    close(first, alone)
    close(second, alone)
    assert len({item["output"] for item in alone[0][1]}) > 2


def test_items_come_in_the_file_s_order_with_their_scores(folder: Path) -> None:
    (vqa, items), (matching, judged), (caption, described) = ranks.everything(folder / "run", folder, 1)
    assert [item["id"] for item in items] == [f"q{n}" for n in range(6)]
    opened = open_inference(folder / "run")
    alone = Evaluator(Prompter(opened.recipe, opened.tokenizer, folder / "images"), opened.forward, 1, 6)
    assert [item["output"] for item in items] == [alone.answer(item["prompt"], item["image"]) for item in items]
    assert items[4]["answer"] == "because" and items[3]["image"] is None and vqa["count"] == 6
    assert (vqa["count_yes_no"], vqa["count_other"]) == (3, 3)
    assert [item["correct"] for item in judged] == [item["output"] == item["answer"] for item in judged]
    assert matching["accuracy"] == pytest.approx(sum(item["correct"] for item in judged) / 7)
    assert [item["image"] for item in described] == list(checkpoints.COLOURS)
    assert caption["loss"] > 0 and caption["exact_match"] == 0.0


def test_the_caption_loss_is_that_of_training(folder: Path) -> None:
    opened = open_inference(folder / "run")
    prompter = Prompter(opened.recipe, opened.tokenizer, folder / "images")
    found = Evaluator(prompter, opened.forward, batch_size=2, max_new_tokens=1).caption(folder / "captions.jsonl")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    batch = prompter.batch([prompter.caption(row["caption"].strip(), row["image"]) for row in rows])
    with torch.no_grad():
        losses = opened._model(batch, opened._inputs)
    assert found.metrics["loss"] == pytest.approx(float(losses.language_sum / losses.weight_sum), rel=1e-5)
    assert found.metrics["tokens"] == int(losses.weight_sum)


def test_the_saved_bias_of_routers_counts(tmp_path: Path) -> None:
    recipe = checkpoints.recipe(bias=True)
    model = checkpoints.random_model(recipe)
    for strength in (0.0, 5.0):
        checkpoints.save(tmp_path / f"{strength}", recipe, model, checkpoints.routers(recipe, strength))
    plain, biased = (open_inference(tmp_path / name) for name in ("0.0", "5.0"))
    prompter = Prompter(recipe, plain.tokenizer)
    batch = prompter.batch([prompter.question("Why?", None)])
    at = torch.tensor([batch.tokens.numel() - 1])
    own = model(
        batch,
        checkpoints.routers(recipe, 5.0).inputs(
            torch.ones(()), dict.fromkeys(("vision", "connector", "decoder"), torch.ones(()))
        ),
        at,
    ).detach()
    torch.testing.assert_close(biased.forward(batch, at), own)
    assert (plain.forward(batch, at) - own).abs().max() > 1e-3


def test_a_world_of_another_size_is_refused(folder: Path) -> None:
    message = (
        "1 processes with --tensor 2: an evaluation runs on its tensor ranks and no others; start it with torchrun"
    )
    with pytest.raises(ConfigError, match=message):
        open_inference(folder / "run", 2)


def test_a_checkpoint_put_together_from_two_runs_is_refused(tmp_path: Path) -> None:
    recipe = checkpoints.recipe()
    state = checkpoints.routers(recipe)
    del state.shares["vision"]
    checkpoints.save(tmp_path / "routers", recipe, checkpoints.random_model(recipe), state)
    with pytest.raises(
        CheckpointError, match=re.escape("router state of ['connector', 'decoder'], the model has exper")
    ):
        open_inference(tmp_path / "routers")
    model = checkpoints.random_model(recipe)
    del model.vision.positions
    checkpoints.save(tmp_path / "names", recipe, model, checkpoints.routers(recipe))
    with pytest.raises(
        CheckpointError, match=re.escape("vision.positions is missing, the model of its recipe.yaml has [")
    ):
        open_inference(tmp_path / "names")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    recipe = checkpoints.recipe()
    small = replace(recipe, model=replace(recipe.model, decoder=replace(recipe.model.decoder, vocab_size=300)))
    checkpoints.save(tmp_path, small, checkpoints.random_model(small), checkpoints.routers(small))
    entries = checkpoints.tokenizer().vocab_size
    with pytest.raises(
        CheckpointError, match=f"its tokenizer has {entries} entries, its model rows for 300; the folder"
    ):
        open_inference(tmp_path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script of launch/ in this process; what it printed."""

    def inner(main: Callable[[], int], *words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        assert main() == 0
        return capsys.readouterr().out

    return inner


def python(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run Python in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_command_writes_everything_down(folder: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    out = tmp_path / "deep" / "out.json"
    shown = command(
        evaluate.main, folder / "run", "--task", "vqa", "--data", folder / "vqa.jsonl", "--images", folder / "images",
        "--out", out, "--limit", "5", "--blank-images", "--max-new-tokens", "4", "--local_rank=0",
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert (report["task"], report["step"], report["count"], len(report["items"])) == ("vqa", 7, 5, 5)
    assert report["image"] == {"size": [16, 24], "resize": "squash", "sub_images": 0, "blank": list(BLANK)}
    assert report["prompt"]["example"] == "<image>Question: What is the colour of the shape?\nAnswer:"
    assert report["items"][1]["prompt"] == "Is this true?" and report["seconds"] > 0
    assert "accuracy" in shown and "every picture blank" in " ".join(shown.split())


def test_a_report_that_cannot_be_written_is_told_before_the_work(folder: Path, tmp_path: Path) -> None:
    words = ["script", "none", "--task", "vqa", "--data", "d", "--images", "i", "--out"]
    (tmp_path / "file").write_text("")
    for out, text in (
        (tmp_path, f"--out {tmp_path} is a folder; name a file in it"),
        (tmp_path / "file" / "out.json", "cannot be written: File exists; name a file in another folder"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=re.escape(text)):
            patch.setattr(sys, "argv", [*words, str(out)])
            evaluate.main()


@pytest.mark.parametrize("words", [["--batch-size", "0"], ["--max-new-tokens", "-1"], ["--tensor", "0"]])
def test_numbers_must_be_positive(command: Callable[..., str], words: list[str], capsys: Any) -> None:
    needed = ["run", "--task", "vqa", "--data", "d", "--images", "i", "--out", "o"]
    with pytest.raises(SystemExit):
        command(evaluate.main, *needed, *words)
    assert f"argument {words[0]}: {words[1]} is less than 1" in capsys.readouterr().err


def test_one_process_starts_without_the_engine_s_libraries(folder: Path) -> None:
    code = (
        "import sys; from mmtrain.inference import open_inference; from mmtrain.evaluate.tasks import Evaluator; "
        f"from pathlib import Path; open_inference(Path({str(folder / 'run')!r})); "
        "print([name for name in ('deepspeed', 'megatron', 'sklearn', 'wandb') if name in sys.modules])"
    )
    assert python("-c", code).stdout == "[]\n"


def test_generate_answers_with_and_without_a_picture(folder: Path, command: Callable[..., str]) -> None:
    question = "What is the colour of the shape?"
    words = [folder / "run", "--prompt", question, "--max-new-tokens", "6"]
    opened = open_inference(folder / "run")
    evaluator = Evaluator(Prompter(opened.recipe, opened.tokenizer, folder / "images"), opened.forward, 1, 6)
    seen, unseen = evaluator.answer(question, "red.png"), evaluator.answer(question, None)
    assert seen != unseen
    assert command(generate.main, *words, "--image", folder / "images" / "red.png") == seen + "\n"
    assert command(generate.main, *words) == unseen + "\n"


def test_a_person_s_mistake_is_one_line(folder: Path) -> None:
    done = python("launch/generate.py", folder / "run", "--prompt", "Why?", "--image", "none.png", code=2)
    assert done.stderr == "error: image none.png cannot be read: No such file or directory\n"


def test_a_damaged_checkpoint_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} is not a checkpoint: it holds no manifest.json")):
        open_inference(tmp_path)
    shutil.copytree(folder / "run", tmp_path / "run")
    file = next((tmp_path / "run").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'run'}: all 1 checkpoints are damaged (step_0")):
        open_inference(tmp_path / "run")
