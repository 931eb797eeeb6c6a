import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtrain.config.errors import ConfigError, DataError
from mmtrain.config.schema import Data, Eval, LossWeights, Recipe, Source
from mmtrain.config.tokens import TokenKind
from mmtrain.data import pool
from mmtrain.data.index import build_index, open_folder, read_index, write_index
from mmtrain.data.loader import Loader, check_sources
from mmtrain.data.record import Batch, Step
from tests.data.inputs import TEXTS, picture, tokenizer, write_tar
from tests.tiny import recipe as tiny

CAPTIONS, PLAIN = 60, 40


def caption(number: int, image: bytes | None = None) -> tuple[str, dict[str, bytes]]:
    form = ("JPEG", "PNG")[number % 2]
    content = {"kind": "caption", "texts": [None, f"a shape {number}"], "images": ["jpg", None]}
    pixels = picture(64, 48, form, (number, 2 * number, 255 - number))
    return f"c{number}", {"json": json.dumps(content).encode(), "jpg": image or pixels}


def plain(number: int) -> tuple[str, dict[str, bytes]]:
    words = TEXTS[number % 4] * (number % 3 + 1)
    content = {"kind": "text", "texts": [f"{number} {words}"], "images": [None]}
    return f"t{number}", {"json": json.dumps(content).encode()}


def index(folder: Path) -> None:
    for tar in folder.glob("*.tar"):
        write_index(build_index(tar, tokenizer())[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of real shards: captions and text."""
    root = tmp_path_factory.mktemp("shards")
    write_tar(root / "captions", [caption(n) for n in range(CAPTIONS)], 13)
    write_tar(root / "text", [plain(n) for n in range(PLAIN)], 13)
    for name in ("captions", "text"):
        index(root / name)
    return root


def make(folder: Path, recipe_changes: dict | None = None, **data: object) -> Recipe:
    base = Data(
        sources={
            "captions": Source(str(folder / "captions"), 0.6),
            "off": Source("nowhere", 0.0),
            "text": Source(str(folder / "text"), 0.4),
        },
        tokenizer=str(tokenizer().path),
        sequence_length=128,
        global_batch=8,
        workers=0,
    )
    return replace(tiny(), **{"data": replace(base, **data), "steps": 5, **(recipe_changes or {})})


def steps(recipe: Recipe, rank: int = 0, size: int = 1, **options: object) -> list[Step]:
    with Loader(recipe, tokenizer(), rank, size, **options) as loader:
        return list(loader)


def packs(step: Step) -> list[dict[str, object]]:
    """Each pack of a step as plain values, wherever it lay in a micro-batch."""
    out = []
    for batch in step.micro_batches:
        for row in range(len(batch.tokens)):
            inside = (batch.image_slots[:, 0] // batch.tokens.shape[1] == row) & batch.image_valid
            names = ("tokens", "labels", "weights", "document_ids", "positions", "kind", "source_ids")
            out.append({name: getattr(batch, name)[row].tolist() for name in names})
            out[-1]["images"] = batch.images[inside].tolist()
            out[-1]["keys"] = batch.keys[row]
    return out


def test_packs_do_not_depend_on_ranks_micro_batches_or_workers(folder: Path) -> None:
    expected = steps(make(folder))
    for size, micro, workers in [(1, 2, 2), (2, 1, 0), (4, 2, 1), (8, 1, 0)]:
        ranks = [steps(make(folder, micro_batch=micro, workers=workers), rank, size) for rank in range(size)]
        for number, whole in enumerate(expected):
            parts = [ranks[rank][number] for rank in range(size)]
            dealt = [packs(part) for part in parts]
            together = [dealt[number % size][number // size] for number in range(8)]
            assert together == packs(whole)
            assert {len(part.micro_batches) for part in parts} == {8 // size // micro}
            assert all(part.cursor == whole.cursor and part.served == whole.served for part in parts)
            assert sum(part.label_weight for part in parts) == whole.label_weight
            for name, total in whole.valid_tokens.items():
                assert sum(part.valid_tokens[name] for part in parts) == total


def test_resume_on_other_ranks_is_the_undisturbed_stream(folder: Path) -> None:
    expected = steps(make(folder))
    for stop, size in [(1, 2), (3, 4), (4, 1)]:
        cursor = json.loads(json.dumps(expected[stop - 1].cursor))
        rest = [steps(make(folder), rank, size, cursor=cursor) for rank in range(size)]
        assert [len(rank) for rank in rest] == [5 - stop] * size
        for number, whole in enumerate(expected[stop:]):
            dealt = [packs(rank[number]) for rank in rest]
            assert [dealt[n % size][n // size] for n in range(8)] == packs(whole)


def test_sums_are_those_of_the_batches(folder: Path) -> None:
    made = make(folder, micro_batch=4)
    vision = made.model.vision
    served = Counter()
    for step in steps(made):
        batches = step.micro_batches
        for batch in batches:
            served.update(batch.source_ids[batch.document_ids >= 0].tolist())
        assert step.served == {"captions": served[0], "text": served[2]}
        images = sum(int(batch.image_valid.sum()) for batch in batches)
        assert step.label_weight == sum(float(batch.weights.sum()) for batch in batches) > 0
        assert step.valid_tokens == {
            "vision": images * (2 * 3 + vision.class_token),
            "connector": images * made.model.connector.num_tokens,
            "decoder": sum(int((batch.document_ids >= 0).sum()) for batch in batches),
        }
        assert step.pack_keys == [keys for batch in batches for keys in batch.keys]
        assert all(batch.num_sources == 3 for batch in batches)
        assert {int(n) for batch in batches for n in batch.source_ids.unique()} <= {0, 2}


def check_batch(batch: Batch, made: Recipe) -> None:
    """What every batch must hold, whatever is in it."""
    length = made.data.sequence_length
    valid = batch.document_ids >= 0
    assert torch.equal(valid, batch.kind != TokenKind.PADDING)
    assert not batch.weights[~valid].any()
    slots = batch.image_slots[batch.image_valid]
    assert torch.equal(slots.flatten().sort().values, (batch.kind.flatten() == TokenKind.IMAGE).nonzero().flatten())
    for row in range(len(batch.tokens)):
        ids, at = batch.document_ids[row], batch.positions[row]
        for t in range(length - 1):
            if batch.weights[row, t]:
                assert ids[t] == ids[t + 1] and batch.labels[row, t] == batch.tokens[row, t + 1]
            if ids[t] >= 0 and ids[t] == ids[t + 1]:
                assert at[t + 1] == at[t] + 1
            elif ids[t + 1] >= 0:
                assert at[t + 1] == 0


def test_every_batch_keeps_its_promises(folder: Path) -> None:
    made = make(folder, micro_batch=4)
    for step in steps(made)[:2]:
        for batch in step.micro_batches:
            check_batch(batch, made)


def test_an_epoch_reads_every_sample_once_and_all_ranks_do_as_many_steps(folder: Path) -> None:
    sources = {"captions": Source(str(folder / "captions"))}
    made = make(folder, {"steps": 0, "epochs": 2.0}, sources=sources)
    ranks = [steps(made, rank, 4) for rank in range(4)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) == Loader.steps_for_epochs(made, tokenizer())
    keys = Counter(key for rank in ranks for step in rank for pack in step.pack_keys for key in pack)
    assert keys == Counter({f"c{n}": 2 for n in range(CAPTIONS)})
    for rank in ranks:
        for step in rank:
            for batch in step.micro_batches:
                check_batch(batch, made)


def test_steps_that_the_capped_sources_cannot_fill_are_an_error(folder: Path) -> None:
    sources = {"captions": Source(str(folder / "captions"), 1.0, max_epochs=1.5)}
    made = make(folder, {"steps": 40}, sources=sources)
    keys: Counter = Counter()
    with (
        pytest.raises(
            DataError, match=r"has given its max_epochs after \d+ of steps=40; lower steps, or raise data.so"
        ),
        Loader(made, tokenizer(), 0, 1) as loader,
    ):
        for step in loader:
            keys.update(key for pack in step.pack_keys for key in pack)
    assert sum(keys.values()) == 1.5 * CAPTIONS and set(keys.values()) == {1, 2}


def test_a_finite_run_pads_with_empty_packs(folder: Path) -> None:
    made = make(folder, workers=1)
    held_out = {"captions": made.data.sources["captions"]}
    ranks = [steps(made, rank, 2, sources=held_out, finite_batches=6) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [6, 6]
    keys = Counter(key for rank in ranks for step in rank for pack in step.pack_keys for key in pack)
    assert keys == Counter({f"c{n}": 1 for n in range(CAPTIONS)})
    last = ranks[0][-1]
    assert last.label_weight == 0 and last.valid_tokens == {"vision": 0, "connector": 0, "decoder": 0}
    assert all(batch.images.shape[0] == 1 and not batch.image_valid.any() for batch in last.micro_batches)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """The same shards with one image garbled after indexing, and one sample cut off by the end of the tar."""
    for name in ("captions", "text"):
        (tmp_path / name).mkdir()
        for file in (folder / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    for shard in open_folder(tmp_path / "captions", tokenizer()):
        for entry in read_index(shard.index).entries:
            member = next(member for member in entry.members if member.suffix == "jpg")
            if entry.key == "c7":
                with Path(shard.path).open("r+b") as file:
                    file.seek(member.offset)
                    file.write(b"\0" * member.size)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_keeps_its_place_as_padding(folder: Path, broken: Path, workers: int) -> None:
    good = steps(make(folder))
    found = steps(make(broken, workers=workers, max_bad_fraction=0.5))
    lines = [line for step in found for line in step.ledger]
    assert {line["key"] for line in lines} == {"c7"} and {line["source"] for line in lines} == {"captions"}
    assert all("unreadable image" in line["reason"] and line["shard"].endswith(".tar") for line in lines)
    seen = 0
    for step, twin in zip(found, good, strict=True):
        assert step.pack_keys == twin.pack_keys and step.cursor == twin.cursor
        for pack, whole in zip(packs(step), packs(twin), strict=True):
            bad = pack["keys"].index("c7") if "c7" in pack["keys"] else None
            place = [bad is not None and n == bad for n in whole["document_ids"]]
            seen += bad is not None
            for name, empty in [("tokens", tokenizer().pad_id), ("weights", 0), ("document_ids", -1), ("kind", 0)]:
                expected = [empty if hit else value for hit, value in zip(place, whole[name], strict=True)]
                assert pack[name] == expected
            assert len(pack["images"]) == len(whole["images"]) - (bad is not None)
    assert seen == len(lines) > 0


def test_a_truncated_member_is_a_bad_sample(broken: Path) -> None:
    shard = open_folder(broken / "text", tokenizer())[-1]
    entries = read_index(shard.index).entries
    recipe = make(broken, sources={"text": Source(str(broken / "text"))}, max_bad_fraction=1.0)
    with Loader(recipe, tokenizer(), 0, 1) as loader:
        os.truncate(shard.path, entries[-1].offset + 600)
        lines = {(line["key"], line["reason"]) for step in loader for line in step.ledger}
    assert {key for key, _ in lines} == {entries[-1].key}
    assert all("the shard ends early" in reason for _, reason in lines)


def test_samples_that_the_index_calls_unusable_are_in_the_ledger_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "captions", [caption(n, b"no image" if n in (3, 8) else None) for n in range(20)], 7)
    index(tmp_path / "captions")
    sources = {"captions": Source(str(tmp_path / "captions"))}
    made = make(tmp_path, {"steps": 0, "epochs": 1.0}, sources=sources)
    ledgers = [[line for step in steps(made, rank, 2) for line in step.ledger] for rank in range(2)]
    assert sorted(line["key"] for ledger in ledgers for line in ledger) == ["c3", "c8"]


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_packs_are_padding_and_move_nothing(folder: Path, workers: int) -> None:
    whole = steps(make(folder))
    found = steps(make(folder, skip_packs=[3, 10, 11], workers=workers, max_bad_fraction=0.0))
    for number, (step, twin) in enumerate(zip(found, whole, strict=True)):
        assert step.cursor == twin.cursor and step.pack_keys == twin.pack_keys and step.served == twin.served
        skipped = {3, 10, 11} & set(range(8 * number, 8 * number + 8))
        for place, (pack, full) in enumerate(zip(packs(step), packs(twin), strict=True), 8 * number):
            if place in skipped:
                assert set(pack["kind"]) == {TokenKind.PADDING} and not any(pack["weights"]) and not pack["images"]
            else:
                assert pack == full
        lines = [(line["key"], line["reason"]) for line in step.ledger]
        expected = [
            (key, f"pack {n} is in data.skip_packs") for n in sorted(skipped) for key in twin.pack_keys[n - 8 * number]
        ]
        assert lines == expected


def test_measuring_never_skips_the_packs_of_training(folder: Path) -> None:
    held_out = {"captions": Source(str(folder / "captions"))}
    found = steps(make(folder, skip_packs=[0, 1]), sources=held_out, finite_batches=2)
    assert [packs(step) for step in found] == [
        packs(step) for step in steps(make(folder), sources=held_out, finite_batches=2)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_text_after_an_image_counts_as_the_recipe_says_in_training_alone(folder: Path, workers: int) -> None:
    plain, weighted = make(folder), make(folder, workers=workers, loss_weights=LossWeights(3.0, 0.5))
    factors = set()
    for step, twin in zip(steps(weighted), steps(plain), strict=True):
        for batch, even in zip(step.micro_batches, twin.micro_batches, strict=True):
            assert batch.labels.equal(even.labels) and batch.tokens.equal(even.tokens)
            factors |= set(batch.weights[even.weights > 0].tolist())
            assert not batch.weights[even.weights == 0].any()
        assert step.label_weight == sum(float(batch.weights.sum()) for batch in step.micro_batches)
    assert factors == {3.0, 0.5}
    held_out = {"captions": Source(str(folder / "captions"))}
    measured = [steps(recipe, sources=held_out, finite_batches=2) for recipe in (weighted, plain)]
    assert [packs(step) for step in measured[0]] == [packs(step) for step in measured[1]]


def test_bad_samples_are_counted_apart_from_those_that_the_recipe_withholds(tmp_path: Path) -> None:
    write_tar(tmp_path / "captions", [caption(n, b"no image" if n % 4 == 0 else None) for n in range(200)], 50)
    index(tmp_path / "captions")
    source = {"captions": Source(str(tmp_path / "captions"))}
    found = steps(make(tmp_path, sources=source, skip_packs=[1]))
    for step in found:
        assert step.bad == [line for line in step.ledger if "skip_packs" not in line["reason"]]
        assert step.samples == sum(map(len, step.pack_keys)) + len(step.bad)  # what the index refused is in no pack
    assert any(step.bad for step in found) and any(len(step.bad) < len(step.ledger) for step in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_tokens_unlike_the_index_stop_the_run(folder: Path, tmp_path: Path, workers: int) -> None:
    """An image that became larger than the canvas has other panels than planned."""
    write_tar(tmp_path / "captions", [caption(n, picture(8, 8).ljust(300, b"\0")) for n in range(30)], 30)
    index(tmp_path / "captions")
    shard = open_folder(tmp_path / "captions", tokenizer())[0]
    entry = next(entry for entry in read_index(shard.index).entries if entry.key == "c4")
    sources = {"captions": Source(str(tmp_path / "captions"))}
    made = make(tmp_path, sources=sources, sub_images=4, workers=workers)
    text_tokens, per_image = entry.tokens, made.model.connector.num_tokens
    with Path(shard.path).open("r+b") as file:
        member = next(member for member in entry.members if member.suffix == "jpg")
        large = picture(64, 64)
        assert len(large) <= member.size
        file.seek(member.offset)
        file.write(large.ljust(member.size, b"\0"))
    with pytest.raises(DataError) as caught:
        steps(made)
    for word in (shard.path, "c4", f"{text_tokens + 5 * per_image} tokens", f"planned {text_tokens + per_image}"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"lanes": 3}, 1, "data.lanes=3 does not divide data.global_batch=8; lanes that fit: 1, 2, 4, 8"),
        ({}, 3, "the data size 3 does not divide the 8 lanes of the stream"),
        ({"lanes": 4}, 8, "data sizes that fit: 1, 2, 4"),
        ({"micro_batch": 4}, 4, "data.global_batch=8 is not a multiple of data.micro_batch=4 x data size 4 = 16"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(folder: Path, changes: dict, size: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Loader(make(folder, **changes), tokenizer(), 0, size)
    assert words in str(caught.value)


def test_folders_are_looked_at_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    made = make(folder)
    check_sources(made, tokenizer())  # `off` has no weight: its folder need not be there
    gone = {"held": Source(str(tmp_path / "gone"))}
    check_sources(replace(made, eval=Eval(every=0, sources=gone)), tokenizer())
    with pytest.raises(DataError, match=r"data folder .*gone: no such folder"):
        check_sources(replace(made, eval=Eval(every=1, sources=gone)), tokenizer())
    with pytest.raises(DataError, match="indexed for tokenizer"):
        check_sources(made, tokenizer("chatml"))


def test_lanes_keep_their_packs_on_every_number_of_ranks(folder: Path) -> None:
    whole = packs(steps(make(folder, lanes=2))[0])
    for rank in range(2):
        assert packs(steps(make(folder, lanes=2), rank, 2)[0]) == whole[rank::2]


@pytest.fixture
def busy(folder: Path) -> Iterator[Loader]:
    with Loader(make(folder, workers=2), tokenizer(), 0, 1) as loader:
        yield loader


def test_workers_ignore_what_stops_the_trainer(busy: Loader) -> None:
    stream = iter(busy)
    next(stream)
    for process in busy.worker_pids():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process, number)
    assert len(list(stream)) == 4


def test_a_dead_worker_is_an_error_that_says_so(busy: Loader) -> None:
    stream = iter(busy)
    next(stream)
    for process in busy.worker_pids():
        os.kill(process, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a decoding process \(pid \d+\) died"):
        list(stream)


CHILD = """
import sys
from tests.data.test_loader import make, tokenizer
from mmtrain.data.loader import Loader
from pathlib import Path
loader = Loader(make(Path(sys.argv[1]), workers=2), tokenizer(), 0, 1)
next(iter(loader))
print(*loader.worker_pids(), flush=True)
sys.stdin.read()
"""


def alive(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_workers_die_with_their_parent(folder: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        cwd=pool.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        workers = [int(number) for number in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        trainer.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def test_workers_import_no_torch() -> None:
    code = "import sys, mmtrain.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pool.ROOT, check=False).returncode == 0
