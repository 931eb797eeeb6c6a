import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain.config.errors import DataError
from mmtrain.config.tokens import TokenKind
from mmtrain.data.index import open_folder
from mmtrain.data.quarantine import NO_FILE, Quarantine, read_quarantine
from tests.data.inputs import tokenizer, write_lines
from tests.data.streams import make, packs, steps


def line(folder: Path, source: str, key: str, shard: int = 0) -> dict[str, str]:
    return {"source": source, "shard": f"somewhere/else/shard-{shard:06d}.tar", "key": key, "reason": "seen"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_quarantined_sample_is_padding_and_moves_nothing(folder: Path, tmp_path: Path, workers: int) -> None:
    whole = steps(make(folder))
    lines = [line(folder, "captions", "c7"), line(folder, "text", "t30", 2), line(folder, "unread", "x")]
    file = write_lines(tmp_path / "q.jsonl", lines)
    found = steps(make(folder, quarantine=str(file), workers=workers, max_bad_fraction=0.0))
    seen = 0
    for step, twin in zip(found, whole, strict=True):
        assert step.pack_keys == twin.pack_keys and step.served == twin.served
        assert step.cursor == twin.cursor | {"quarantine": step.cursor["quarantine"]}
        places = [
            (pack, full, n)
            for pack, full in zip(packs(step), packs(twin), strict=True)
            for n in range(len(full["keys"]))
        ]
        for pack, full, number in places:
            at = [t for t, n in enumerate(full["document_ids"]) if n == number]
            if full["keys"][number] in ("c7", "t30"):
                seen += 1
                assert {pack["kind"][t] for t in at} == {TokenKind.PADDING} and not any(pack["weights"][t] for t in at)
            else:
                for name in ("tokens", "labels", "weights", "document_ids", "positions", "kind", "source_ids"):
                    assert [pack[name][t] for t in at] == [full[name][t] for t in at]
        assert {(entry["key"], entry["reason"]) for entry in step.ledger} <= {
            ("c7", "in quarantine"),
            ("t30", "in quarantine"),
        }
    assert sum(len(step.ledger) for step in found) == seen > 1


def test_a_resumed_run_keeps_the_file_that_it_began_with(folder: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "q.jsonl", [line(folder, "captions", "c7")])
    made = make(folder, quarantine=str(file))
    cursor = json.loads(json.dumps(steps(made)[1].cursor))
    assert len(steps(made, cursor=cursor)) == 3
    moved = replace(made, data=replace(made.data, quarantine=str(file.rename(tmp_path / "moved.jsonl"))))
    assert len(steps(moved, cursor=cursor)) == 3  # its content counts
    write_lines(tmp_path / "moved.jsonl", [line(folder, "captions", "c8")])
    with pytest.raises(
        DataError, match=r"data.quarantine: the run began with file \w{16}, now it is \w{16} .*resume_all"
    ):
        steps(moved, cursor=cursor)
    with pytest.raises(DataError, match=f"now it is {NO_FILE}"):
        steps(make(folder), cursor=cursor)
    allowed = replace(moved, resume_allow=["data.quarantine"])
    assert len(steps(allowed, cursor=cursor)) == 3


def test_files_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    shards = {"captions": open_folder(folder / "captions", tokenizer())}
    assert read_quarantine("", shards) == Quarantine()
    with pytest.raises(DataError, match=r"data.quarantine: .*none.jsonl cannot be read \(No such file"):
        read_quarantine(str(tmp_path / "none.jsonl"), shards)
    for text, words in [
        ("{", "line 1: not an object with source, shard and key"),
        ("[]", "line 1: not an object with source, shard and key"),
        ('\n{"source": "captions", "shard": 3, "key": "c1"}', "line 2: not an object with source, shard and key"),
        (json.dumps(line(folder, "captions", "c7", 99)), "source captions has no shard shard-000099.tar"),
        (json.dumps(line(folder, "captions", "c77")), "has no sample 'c77'; correct or remove the line"),
    ]:
        file = tmp_path / "q.jsonl"
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            read_quarantine(str(file), shards)
