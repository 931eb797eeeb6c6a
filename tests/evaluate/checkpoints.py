"""A checkpoint with random weights and a folder of questions about small pictures."""

from dataclasses import replace
from pathlib import Path

import torch

from mmtrain.config.load import dump
from mmtrain.config.schema import Recipe
from mmtrain.model.balance import RouterState
from mmtrain.model.vlm import VisionLanguageModel
from mmtrain.mup.scales import base_model_config, forward_scales
from mmtrain.run.comm import SingleProcess
from mmtrain.run.manifest import RunState
from mmtrain.run.saver import Saver
from tests import tiny
from tests.data.inputs import picture, tokenizer, write_lines
from tests.run.ranks import whole

COLOURS = {"red.png": (200, 30, 30), "green.png": (20, 180, 40), "blue.png": (10, 20, 220)}


def recipe(bias: bool = False, chat_template: str = "plain") -> Recipe:
    """Experts in all three parts, muP multipliers that are not 1, the vocabulary of the tests' tokenizer."""
    base = tiny.recipe()
    model = base.model
    model = replace(model, decoder=replace(model.decoder, vocab_size=tokenizer(chat_template).vocab_size))
    if bias:
        moe = replace(model.decoder.moe, balance="bias")
        model = replace(model, decoder=replace(model.decoder, moe=moe))
    return replace(base, model=model, data=replace(base.data, chat_template=chat_template))


def random_model(chosen: Recipe, seed: int = 0) -> VisionLanguageModel:
    """Weights large enough that answers depend on everything; rows that pad the vocabulary are zero."""
    scales = forward_scales(chosen.model, base_model_config(chosen.model, chosen.mup.base), chosen.mup)
    model = VisionLanguageModel(chosen.model, scales).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
            if name in ("decoder.embedding.weight", "decoder.head.weight"):
                parameter[chosen.model.decoder.vocab_size :] = 0.0
    return model


def routers(chosen: Recipe, strength: float = 0.0) -> RouterState:
    """The state of a run's routers; strength: std of the decoder's loss-free bias."""
    state = RouterState.first(chosen.model)
    state.bias["decoder"] = strength * torch.randn(
        state.bias["decoder"].shape, generator=torch.Generator().manual_seed(3)
    )
    return state


def save(folder: Path, chosen: Recipe, model: VisionLanguageModel, state: RouterState, step: int = 7) -> Path:
    """The run folder `folder` with one checkpoint."""
    vocab = chosen.model.decoder.vocab_size
    pieces = []
    for name, parameter in model.named_parameters():
        padded = name in ("decoder.embedding.weight", "decoder.head.weight")
        pieces.append(whole(name, parameter.detach()[:vocab] if padded else parameter.detach()))
    mesh = {"world": 1, "tensor": 1, "expert": 1, "zero_stage": 0}
    run_state = RunState(step, dump(chosen), mesh, "hash", routers=state.as_json())
    saver = Saver(folder, SingleProcess())
    saver.save(step, pieces, run_state, {"tokenizer.json": tokenizer(chosen.data.chat_template).path.read_bytes()})
    saver.wait()
    return folder


def random_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A run folder with one checkpoint of random weights."""
    return save(folder, recipe(), random_model(recipe(), seed), routers(recipe()))


def pictures(folder: Path) -> Path:
    """Three small pictures of one colour each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        (folder / name).write_bytes(picture(24, 16, colour=colour))
    return folder


def questions(folder: Path) -> Path:
    """Questions of different lengths, several about one picture, one about none."""
    asked = [
        ("red.png", "What is the colour of the shape?", ["green"]),
        ("green.png", "Is this true?", ["yes"]),
        ("red.png", "Is there a red circle above the blue square, and what is beside it?", ["no"]),
        (None, "Is fire cold?", ["no"]),
        ("blue.png", "Why?", ["because"] * 7 + ["so"] * 3),
        ("red.png", "Colour?", ["red"]),
    ]
    records = [
        {"question_id": f"q{number}", "question": question, "answers": answers} | ({"image": image} if image else {})
        for number, (image, question, answers) in enumerate(asked)
    ]
    return write_lines(folder / "vqa.jsonl", records)


def statements(folder: Path, count: int = 7) -> Path:
    """Statements with both labels."""
    names = list(COLOURS)
    records = [
        {
            "id": f"s{number}",
            "image": names[number % 3],
            "statement": f"there are {number} blue squares " + "and a tree " * (number % 4),
            "label": number % 3 == 0,
        }
        for number in range(count)
    ]
    return write_lines(folder / "matching.jsonl", records)


def captions(folder: Path) -> Path:
    """One caption for each picture."""
    records = [
        {"image": name, "caption": f" It is {name.split('.')[0]}{' now' * i}. "} for i, name in enumerate(COLOURS)
    ]
    return write_lines(folder / "captions.jsonl", records)
