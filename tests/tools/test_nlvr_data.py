"""What an image-text matching run trains on, is tuned on, and never sees."""

import json
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from tests.data.inputs import picture, question, write_lines
from tools.nlvr_data import HELD_OUT_EVERY, build

SAME = (9, 9, 9)


def raw(folder: Path) -> Path:
    """Panels of sentences 1, 2, one held out, and three of the test split; an icon.

    Byte for byte, a panel of sentence 2 is one held out, and two of the test split are one trained on and one held out.
    The first panel is only asked about; the last one, of the sentence held out, has only a caption.
    """
    held = HELD_OUT_EVERY
    colours = {"1-0-0": (1, 1, 1), "2-0-0": (2, 2, 2), "2-0-1": SAME, f"{held}-0-0": SAME, f"{held}-1-0": (3, 3, 3)}
    colours[f"{held}-2-0"] = (5, 5, 5)
    names = {f"nlvr/dev-{panel}.png": colour for panel, colour in colours.items()} | {"icons/a.png": (4, 4, 4)}
    for name, colour in names.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(picture(colour=colour))
    tests = {"nlvr/test-1.png": (1, 1, 1), "nlvr/test-2.png": (8, 8, 8), "nlvr/test-3.png": SAME}
    for name, colour in tests.items():
        (folder / "images" / name).write_bytes(picture(colour=colour))
    for part in ("captions", "instruct", "eval"):
        (folder / part).mkdir()
    statements = [{"id": name, "image": name, "statement": "So?", "label": True} for name in tests]
    write_lines(folder / "eval" / "matching_nlvr_test.jsonl", statements)
    told = [{"image": name, "caption": f"In {name}."} for name in list(names)[1:]]
    write_lines(folder / "captions" / "train.jsonl", told)
    shown = [name for name in names if "-2-0.png" not in name]
    asked = [{"id": name, "image": name, "conversations": question(f"<image>\nIn {name}?", "true")} for name in shown]
    text_only = {"id": "talk", "image": None, "conversations": question("Hello?", "hello")}
    (folder / "instruct" / "train.json").write_text(json.dumps([*asked, text_only]))
    return folder


def images(file: Path) -> list[str]:
    return [json.loads(line)["image"] for line in file.read_text().splitlines()]


def test_no_panel_that_is_measured_with_is_trained_on_nor_a_copy_of_one(tmp_path):
    found = build(raw(tmp_path), tmp_path / "out")
    assert found == {"captions": 1, "questions": 2, "held_out": 2, "test.jsonl": 1}
    assert images(tmp_path / "out" / "captions.jsonl") == ["nlvr/dev-2-0-0.png"]
    assert images(tmp_path / "out" / "questions.jsonl") == ["nlvr/dev-1-0-0.png", "nlvr/dev-2-0-0.png"]
    assert images(tmp_path / "out" / "held_out.jsonl") == ["nlvr/dev-12-0-0.png", "nlvr/dev-12-1-0.png"]
    assert images(tmp_path / "out" / "test.jsonl") == ["nlvr/test-2.png"]
    for name in ("captions", "questions", "held_out"):
        assert list((tmp_path / "out" / name).glob("*.tar"))
    assert not (tmp_path / "out.partial").exists()


def test_mistakes_are_told_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match=r"captions/train.jsonl: no such file; RAW is the folder with captions/"):
        build(tmp_path, tmp_path / "out")
    folder = raw(tmp_path)
    (folder / "images" / "nlvr" / "dev-1-0-0.png").unlink()
    with pytest.raises(DataError, match=r"dev-1-0-0.png: no such file"):
        build(folder, tmp_path / "out")
    (folder / "captions" / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"0 captions and 5 questions about images under nlvr/; both needed"):
        build(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"instruct: exists already; choose another folder or delete it"):
        build(folder, folder / "instruct")
