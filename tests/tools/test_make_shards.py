import json
import shutil
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.data.chat import TEMPLATES
from mmtrain.data.index import open_folder, read_index
from mmtrain.data.record import Text
from mmtrain.data.shards import read_members
from mmtrain.data.tokenizer import Tokenizer
from tests.data.inputs import decode_document, picture, raw_folder, tokenizer, write_lines, write_tar
from tools.make_shards import index_folder, main, make_shards
from tools.train_tokenizer import main as train_main

FORMATS = ("captions", "interleaved", "text", "instruct")


def contents(folder: Path) -> dict[str, bytes]:
    """File name -> bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(name: str, source: Path, out: Path, *options: str) -> int:
    return main([name, str(source), "--out", str(out), "--tokenizer", str(tokenizer().path), *options])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", FORMATS)
def test_raw_data_to_decoded_documents(tmp_path: Path, name: str, template: str) -> None:
    source = raw_folder(tmp_path / "raw")[name]
    assert command(name, source, tmp_path / "out", "--samples-per-shard", "2", "--chat-template", template) == 0
    documents = []
    for shard in open_folder(tmp_path / "out", tokenizer(template)):
        for entry in read_index(shard.index).entries:
            documents.append(decode_document(entry, read_members(shard.path, entry), tokenizer(template), shard.path))
            texts = [part for part in documents[-1].parts if isinstance(part, Text)]
            assert sum(len(text.token_ids) for text in texts) == entry.tokens
            assert sum(int(text.supervised.sum()) for text in texts) == entry.supervised
    images = [part.data for document in documents for part in document.parts if not isinstance(part, Text)]
    raw = {path.name: path.read_bytes() for path in (tmp_path / "raw").iterdir()}
    order = {
        "captions": ["a.png", "b.jpg", "a.png"],
        "interleaved": ["b.jpg", "a.png", "c.webp"],
        "text": [],
        "instruct": ["a.png", "b.jpg", "c.webp"],
    }[name]
    assert images == [raw[file] for file in order]  # copied as they are
    assert len(documents) == {"captions": 3, "interleaved": 2, "text": 2, "instruct": 3}[name]


@pytest.mark.parametrize("name", FORMATS)
def test_same_input_same_bytes_and_indexing_again_changes_nothing(tmp_path: Path, name: str) -> None:
    source = raw_folder(tmp_path / "raw")[name]
    for out in ("one", "two"):
        assert command(name, source, tmp_path / out, "--samples-per-shard", "2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for path in (tmp_path / "two").glob("*.index"):
        path.unlink()
    assert main(["wds", str(tmp_path / "two"), "--tokenizer", str(tokenizer().path)]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def bad_captions(folder: Path, count: int = 2) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    good = {"image": "a.png", "caption": "fine"}
    return write_lines(folder / "c.jsonl", [good, *[{"image": "gone.png", "caption": "x"}] * count, good])


def test_a_bad_record_stops_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = bad_captions(tmp_path / "raw")
    assert command("captions", source, tmp_path / "out") == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"error: {source}, line 2 (key 'gone-00000001'): image 'gone.png' does not exist in ")
    assert last.endswith(
        "(and 1 more); nothing was written; correct the captions input, or pass --skip-bad to leave bad records out"
    )
    assert len(notes) == 2 and "line 3" in notes[1]
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_reading_stops_after_the_first_problems(tmp_path: Path) -> None:
    source = bad_captions(tmp_path / "raw", count=30)
    with pytest.raises(DataError, match=r"\(and 19 more, at least\)"):
        make_shards("captions", source, source.parent, tmp_path / "out", tokenizer())


def test_skip_bad_keeps_the_rest_and_lists_what_it_left_out(tmp_path: Path) -> None:
    source = bad_captions(tmp_path / "raw", count=30)
    assert command("captions", source, tmp_path / "out", "--skip-bad") == 0
    (shard,) = open_folder(tmp_path / "out", tokenizer())
    assert [entry.key for entry in read_index(shard.index).entries] == ["a-00000000", "a-00000031"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and lines[0]["where"].endswith("line 2 (key 'gone-00000001')")
    assert lines[0]["why"].startswith("image 'gone.png' does not exist")


def test_nothing_but_bad_records(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"text": ""}, {}])
    with pytest.raises(
        DataError, match=r"no usable record, all 2 are bad; the first: .*t.jsonl, line 1 .*: empty text"
    ):
        make_shards("text", source, tmp_path, tmp_path / "out", tokenizer(), skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_an_output_that_exists_stays_untouched_and_leftovers_go(tmp_path: Path) -> None:
    source = raw_folder(tmp_path / "raw")["text"]
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "shard-000099.tar").write_bytes(b"left by a killed run")
    out.mkdir()  # an empty folder is fine
    assert command("text", source, out) == 0
    before = contents(out)
    assert set(before) == {"shard-000000.tar", "shard-000000.index"} and not (tmp_path / "out.partial").exists()
    with pytest.raises(DataError, match=r"output .*out: exists already; choose another folder or delete it"):
        make_shards("text", source, tmp_path, out, tokenizer())
    assert contents(out) == before


def test_img2dataset_folder_is_indexed_in_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "wds"
    (tar,) = write_tar(
        folder,
        [
            ("000000000", {"jpg": picture(30, 20, "JPEG"), "json": b'{"url": "u", "caption": "c"}', "txt": b"A bar."}),
            ("000000001", {"jpg": b"broken", "json": b"{}", "txt": b"x"}),
        ],
    )
    tar.rename(folder / "00000.tar")
    before = (folder / "00000.tar").read_bytes()
    assert main(["wds", str(folder), "--tokenizer", str(tokenizer().path)]) == 0
    shown = capsys.readouterr().out
    assert "unusable, marked in the index: " in shown and "key '000000001': member jpg: not an image" in shown
    (shard,) = open_folder(folder, tokenizer())
    good, bad = read_index(shard.index).entries
    assert (good.kind, good.images, bad.unusable) == ("caption", 1, "member jpg: not an image (no known header)")
    assert (folder / "00000.tar").read_bytes() == before


def test_wds_without_a_usable_sample_writes_no_index(tmp_path: Path) -> None:
    write_tar(tmp_path, [("k", {"txt": b"x"})])
    with pytest.raises(DataError, match=r"no usable sample in 1 shards; the first: .*key 'k': 0 images"):
        index_folder(tmp_path, tokenizer())
    assert list(tmp_path.glob("*.index")) == []


def test_summary_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command("captions", raw_folder(tmp_path / "raw")["captions"], tmp_path / "out") == 0
    rows = [line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    table = {label.strip(): value.strip() for label, value in rows}
    tokens = sum(len(tokenizer().encode(text)) + 1 for text in ("A red bar.", "Dots and é.", "The same bar again."))
    expected = {"shards": "1", "samples": "3", "unusable": "0", "images": "3", "image sizes": "2"}
    assert expected | {"text tokens": str(tokens), "learnt tokens": str(tokens)} == {
        label: table[label] for label in [*expected, "text tokens", "learnt tokens"]
    }


def test_tokenizer_is_trained_on_the_way_or_by_its_own_tool(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = raw_folder(tmp_path / "raw")
    own, new = tmp_path / "own.json", tmp_path / "new.json"
    assert train_main([str(files["text"]), "--vocab-size", "266", "--out", str(own)]) == 0
    options = ["--out", str(tmp_path / "out"), "--train-tokenizer", "266", "--tokenizer", str(new)]
    assert main(["text", str(files["text"]), *options]) == 0
    assert own.read_bytes() == new.read_bytes() and Tokenizer(own).vocab_size == 266
    assert open_folder(tmp_path / "out", Tokenizer(new))
    assert train_main([str(files["text"]), "--vocab-size", "266", "--out", str(own)]) == 2
    assert "own.json: exists already; shards may depend on it, so choose another name" in capsys.readouterr().err


def test_a_tokenizer_trained_for_bad_input_does_not_stay(tmp_path: Path) -> None:
    source, new = bad_captions(tmp_path / "raw"), tmp_path / "new.json"
    options = ["--out", str(tmp_path / "out"), "--train-tokenizer", "300", "--tokenizer", str(new)]
    assert main(["captions", str(source), *options]) == 2
    assert not new.exists()
    assert main(["captions", str(source), *options, "--skip-bad"]) == 0
    assert new.exists() and main(["captions", str(source), *options]) == 2
    assert new.exists(), "an older tokenizer was removed"


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fixed = ["--tokenizer", str(tokenizer().path)]
    assert main(["wds", str(tmp_path), "--out", str(tmp_path / "x"), *fixed]) == 2
    assert "wds indexes tars in place: leave --out and --train-tokenizer away" in capsys.readouterr().err
    assert main(["text", str(tmp_path / "t.jsonl"), *fixed]) == 2
    assert "text: --out is missing; name a new folder for the shards" in capsys.readouterr().err
    assert command("text", tmp_path / "t.jsonl", tmp_path / "x", "--samples-per-shard", "0") == 2
    assert "--samples-per-shard 0: must be at least 1" in capsys.readouterr().err
    assert command("text", tmp_path / "none.jsonl", tmp_path / "x") == 2
    assert "none.jsonl: no such file; correct the path" in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_shards_can_be_moved(tmp_path: Path) -> None:
    assert command("text", raw_folder(tmp_path / "raw")["text"], tmp_path / "out") == 0
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    (shard,) = open_folder(tmp_path / "elsewhere", tokenizer())
    entry = read_index(shard.index).entries[0]
    assert decode_document(entry, read_members(shard.path, entry), tokenizer(), shard.path).key == "t0"
