"""easy-VQA as a user's raw data: captions, interleaved documents, text, conversations, and files to measure with.

    python -m tools.demo_data --out DIR

The PyPI package easy-vqa (MIT) holds 4,000 training and 1,000 test images, 64 x 64, of one coloured shape each, with
48,248 questions. Everything here is derived from its questions and answers alone; test images are only in eval files.
"""

import argparse
import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import easy_vqa

from launch.entry import run, setup
from mmtrain.config.errors import DataError
from mmtrain.evaluate.wording import ANSWERS, matching_question

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "gray", "red", "blue", "green", "yellow", "teal", "brown")
IMAGES_PER_DOCUMENT = 3
QUESTIONS_PER_TEXT = 8

Questions = list[tuple[str, str]]


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    build(parser.parse_args().out)
    return 0


def build(out: Path) -> None:
    """Write images/, captions.jsonl, interleaved.jsonl, text.jsonl, instruct.json and eval/ under the new folder `out`.

    DataError: it holds something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"output {out}: exists already; choose another folder or delete it")
    (out / "eval").mkdir(parents=True)
    train, test = read("train", out / "images"), read("test", out / "images")
    rng = random.Random(0)
    lines(out / "captions.jsonl", captions(train))
    lines(out / "interleaved.jsonl", interleaved(train, rng))
    lines(out / "text.jsonl", texts(train, rng))
    (out / "instruct.json").write_text(json.dumps(conversations(train, rng), indent=0))
    lines(out / "eval" / "captions.jsonl", captions(test))
    (out / "eval" / "instruct.json").write_text(json.dumps(conversations(test, rng), indent=0))
    lines(out / "eval" / "vqa.jsonl", questions(test))
    lines(out / "eval" / "matching.jsonl", statements(test, rng))


def read(split: str, images: Path) -> dict[str, Questions]:
    """Image path under `images` -> its questions; copies the images there."""
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    rows = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    (images / split).mkdir(parents=True)
    names = {}
    for number, path in sorted(paths.items()):
        names[number] = f"{split}/{number:04d}.png"
        shutil.copyfile(path, images / names[number])
    found: dict[str, Questions] = defaultdict(list)
    for question, answer, number in zip(*rows, strict=True):
        found[names[number]].append((question, answer))
    return dict(sorted(found.items()))


def attributes(questions_of_image: Questions) -> tuple[str | None, str | None]:
    """(colour, shape) as far as the image's questions tell."""
    found: dict[tuple[str, ...], str] = {}
    for question, answer in questions_of_image:
        words = question.rstrip("?").split()
        present = answer if question.startswith("what") else None
        # "is there a red shape? yes" and "is there not a red shape? no" both say red; an open question names what is.
        if question.startswith("what") or (answer == "yes") != ("not" in words or "no" in words):
            for values in (COLOURS, SHAPES):
                for word in (*words, present):
                    if word in values:
                        found[values] = word
    return found.get(COLOURS), found.get(SHAPES)


def described(questions_of_image: Questions) -> str:
    """The image in a few words: "blue circle", "blue shape" or "circle"."""
    colour, shape = attributes(questions_of_image)
    return " ".join(filter(None, (colour, shape or "shape")))


def captions(images: dict[str, Questions]) -> list[dict[str, Any]]:
    """One caption an image whose colour and shape its questions tell."""
    return [
        {"image": image, "caption": f"a {described(asked)}."}
        for image, asked in images.items()
        if all(attributes(asked))
    ]


def interleaved(images: dict[str, Questions], rng: random.Random) -> list[dict[str, Any]]:
    """Documents of a few images, a sentence after each (OBELICS form)."""
    names = [image for image, asked in images.items() if all(attributes(asked))]
    rng.shuffle(names)
    documents = []
    for number in range(0, len(names), IMAGES_PER_DOCUMENT):
        chosen = names[number : number + IMAGES_PER_DOCUMENT]
        documents.append(
            {
                "id": f"album-{number // IMAGES_PER_DOCUMENT:04d}",
                "images": [item for image in chosen for item in (image, None)],
                "texts": [item for image in chosen for item in (None, f"here is a {described(images[image])}.")],
            }
        )
    return documents


def texts(images: dict[str, Questions], rng: random.Random) -> list[dict[str, Any]]:
    """Text alone: an image in words, then questions about it with their answers."""
    documents = []
    for image, asked in images.items():
        chosen = rng.sample(asked, min(len(asked), QUESTIONS_PER_TEXT))
        body = " ".join(f"{question} {answer}." for question, answer in chosen)
        documents.append({"id": Path(image).stem, "text": f"a {described(asked)}. {body}"})
    return documents


def conversations(images: dict[str, Questions], rng: random.Random) -> list[dict[str, Any]]:
    """All questions of an image in one conversation (LLaVA form), in random order; then a statement about it alone."""
    judged: dict[str, Questions] = defaultdict(list)
    for statement in statements(images, rng):
        judged[statement["image"]].append((matching_question(statement["statement"]), ANSWERS[statement["label"]]))
    records = []
    for image, asked in images.items():
        key = image.replace("/", "-").removesuffix(".png")
        records.append(conversation(key, image, rng.sample(asked, len(asked))))
        if image in judged:
            records.append(conversation(f"{key}-statement", image, [rng.choice(judged[image])]))
    return records


def conversation(key: str, image: str, asked: Questions) -> dict[str, Any]:
    """Questions and answers as LLaVA's turns; the image opens the first."""
    turns = []
    for number, (question, answer) in enumerate(asked):
        turns.append({"from": "human", "value": ("" if number else "<image>\n") + question})
        turns.append({"from": "gpt", "value": answer})
    return {"id": key, "image": image, "conversations": turns}


def questions(images: dict[str, Questions]) -> list[dict[str, Any]]:
    """Every question of every image, each on its own."""
    return [
        {"question_id": f"{Path(image).stem}-{number}", "image": image, "question": question, "answers": [answer]}
        for image, asked in images.items()
        for number, (question, answer) in enumerate(asked)
    ]


def statements(images: dict[str, Questions], rng: random.Random) -> list[dict[str, Any]]:
    """Statements about the images, half of them true: another colour or another shape makes one false."""
    records = []
    for image, asked in images.items():
        colour, shape = attributes(asked)
        if colour is None or shape is None:
            continue
        wrong_colour = rng.choice([value for value in COLOURS if value != colour])
        wrong_shape = rng.choice([value for value in SHAPES if value != shape])
        false = rng.choice([f"a {wrong_colour} {shape}.", f"a {colour} {wrong_shape}."])
        for label, statement in ((True, f"a {colour} {shape}."), (False, false)):
            records.append(
                {"id": f"{Path(image).stem}-{label}", "image": image, "statement": statement, "label": label}
            )
    return records


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    run(main)
