import ast
import json
import re
import socket
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from mmtrain.config.schema import LossWeights
from mmtrain.data import wire
from mmtrain.data.collate import Shape
from mmtrain.data.image import Canvas
from mmtrain.data.ordering import Planned
from mmtrain.data.pack import Cut
from mmtrain.data.reader import ReaderSpec
from mmtrain.data.wire import Channel, planned, reader_spec
from tests.test_layers import imported


def test_messages_arrive_one_by_one_as_they_were() -> None:
    left, right = map(Channel, socket.socketpair())
    sent = [{"keys": ["a/é", "half \udcff", "\n", ""]}, [], "x" * (1 << 20)]  # longer than a socket holds
    thread = threading.Thread(target=lambda: [left.send(message) for message in sent])
    thread.start()
    assert [right.receive() for _ in sent] == sent
    thread.join()
    left.close()
    with pytest.raises(EOFError):
        right.receive()
    right.close()


def test_an_end_inside_a_message_is_an_end() -> None:
    left, right = socket.socketpair()
    left.sendall(b'{"whole": 1}\n{"half": 2}')
    left.close()
    channel = Channel(right)
    assert channel.receive() == {"whole": 1}
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


def test_what_a_worker_is_told_is_what_it_understands() -> None:
    shape = Shape(Canvas(336, 224, "pad", 4, 1000), 64, 2048)
    spec = ReaderSpec("tok.json", "chatml", shape, ("captions", "text"), "/cache", 1 << 40, LossWeights(0.1, 1 / 3))
    assert reader_spec(json.loads(json.dumps(asdict(spec)))) == spec
    whole = Planned(10**12, 1, "a.index", 7, 60, 2)
    part = Planned(3, 0, "b.index", 8, 50, 1, 2, Cut(1, 0, 4, 17, 50, 1), "in quarantine")
    for document in (whole, part):
        found = planned(json.loads(json.dumps(document)))
        assert found == document and type(found.cut) is type(document.cut)


FOLDER = Path(wire.__file__).parent
RUNS_WHAT_IT_READS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing", "joblib"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_nothing_in_the_stream_could_unpickle(path: Path) -> None:
    source = path.read_text()
    names = {name.partition(".")[0] for name in imported(f"mmtrain/data/{path.name}", ast.parse(source))}
    assert not names & RUNS_WHAT_IT_READS
    assert not re.search(r"\b(torch|np|numpy)\.load\b|\beval\(|\bexec\(", source)
