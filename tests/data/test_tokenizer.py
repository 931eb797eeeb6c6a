import json
import shutil
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.data.chat import TEMPLATES
from mmtrain.data.tokenizer import Tokenizer, train_bpe
from tests.data.inputs import TEXTS, tokenizer


@pytest.mark.parametrize("text", ["plain words", "é ß 漢字 🙂", "line\n\tbreak  two", "\x00\x7f", ""])
def test_every_text_survives_the_round_trip(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_text_of_a_user_never_becomes_a_special_token() -> None:
    chatml = tokenizer("chatml")
    text = "<image><eos><|im_end|><pad>"
    special = {chatml.image_id, chatml.eos_id, chatml.pad_id, chatml.special_id("<|im_end|>")}
    assert len(special) == 4
    assert not special & set(chatml.encode(text))
    assert chatml.decode(chatml.encode(text)) == text


def test_a_batch_equals_its_texts_one_by_one() -> None:
    texts = [*TEXTS, "", "x"]
    assert tokenizer().encode_batch(texts) == [tokenizer().encode(text) for text in texts]


def test_training_is_deterministic_and_as_large_as_asked(tmp_path: Path) -> None:
    first = train_bpe(TEXTS, 300, tmp_path / "a.json").read_bytes()
    assert first == train_bpe(TEXTS, 300, tmp_path / "b.json").read_bytes()
    assert Tokenizer(tmp_path / "a.json").vocab_size == 300
    assert Tokenizer(tmp_path / "a.json", "chatml").vocab_size == 300  # its tokens are in every trained file


def test_hash_changes_with_file_template_and_special_tokens(tmp_path: Path) -> None:
    file = train_bpe(TEXTS, 300, tmp_path / "tokenizer.json")
    hashes = {Tokenizer(file).hash, Tokenizer(file, "chatml").hash, Tokenizer(file, "vicuna").hash}
    assert Tokenizer(file).hash == Tokenizer(tmp_path).hash  # the folder means the file in it
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer(file).eos == "<|im_end|>"
    hashes.add(Tokenizer(file).hash)
    (tmp_path / "tokenizer_config.json").unlink()
    hashes.add(Tokenizer(train_bpe(TEXTS, 301, tmp_path / "other.json")).hash)
    assert len(hashes) == 5


def _foreign(folder: Path, end: str) -> Path:
    """A tokenizer.json as another project would ship it: one special token, none of ours, a BOS post-processor."""
    content = json.loads(train_bpe(TEXTS, 300, folder / "raw.json").read_text("utf-8"))
    tokens = content["added_tokens"]
    renamed = tokens[1]["content"], end
    content["added_tokens"] = [token | {"content": end} for token in tokens[1:2]]
    vocab = content["model"]["vocab"]
    vocab[end] = vocab.pop(renamed[0])
    for number, token in enumerate(tokens):
        if number != 1:
            vocab[f"unused{number}"] = vocab.pop(token["content"])
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return folder


def test_a_foreign_tokenizer_gets_the_tokens_that_it_lacks_after_its_last_id(tmp_path: Path) -> None:
    loaded = Tokenizer(_foreign(tmp_path, "</s>"), "chatml")
    assert loaded.eos == "</s>"
    added = [loaded.pad_id, loaded.image_id, loaded.special_id("<|im_start|>"), loaded.special_id("<|im_end|>")]
    assert sorted(added) == [300, 301, 302, 303] and loaded.vocab_size == 304
    assert len(loaded.encode("no truncation of long texts")) > 3


def test_the_chat_template_can_come_from_the_file_beside_the_tokenizer(tmp_path: Path) -> None:
    folder = _foreign(tmp_path, "</s>")
    config = folder / "tokenizer_config.json"
    declared = {"eos_token": "</s>", "chat_template": "{{ '<|im_start|>' }}"}
    config.write_text(json.dumps(declared))
    loaded = Tokenizer(folder, "auto")
    assert loaded.hash == Tokenizer(folder, "chatml").hash and loaded.template is TEMPLATES["chatml"]
    assert loaded.files().keys() == {"tokenizer.json", "tokenizer_config.json"}
    (folder / "chat_template.jinja").write_text("{{ '[INST] ' }}")
    assert Tokenizer(folder, "auto").template is TEMPLATES["mistral"]
    assert "chat_template.jinja" in Tokenizer(folder, "auto").files()
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not valid JSON \(.*\); get the file anew"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"tokenizer_config.json: not valid JSON \(.*\); get the file anew"),
        ("[1]", r"tokenizer_config.json: a JSON list, not an object; get"),
        ('{"eos_token": 3}', "tokenizer_config.json: eos_token is 3, not text; correct it, or get the file anew"),
    ],
)
def test_a_broken_tokenizer_config(tmp_path: Path, text: str, words: str) -> None:
    shutil.copy(tokenizer().path, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError, match=words):
        Tokenizer(tmp_path)


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json: no such file; train one with .*train_tokenizer"):
        Tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"broken.json: not a readable tokenizer.json .*; get the file anew"):
        Tokenizer(tmp_path / "broken.json")
    with pytest.raises(
        DataError, match="vocabulary of 100: too small for 256 bytes and 5 special tokens; give at least 261"
    ):
        train_bpe(TEXTS, 100, tmp_path / "small.json")
    with pytest.raises(DataError, match="chat template 'alpaca' does not exist: choose one of plain, chatml, vicuna"):
        Tokenizer(tokenizer().path, "alpaca")
    with pytest.raises(
        DataError, match=r"documents cannot end; name its end token as eos_token in .*tokenizer_config.json"
    ):
        Tokenizer(_foreign(tmp_path, "<stop>"))
