import socket
import threading
from multiprocessing.connection import Connection

import numpy as np
import pytest

from mmtrain.data.wire import receive, send


def pair() -> tuple[Connection, Connection]:
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), Connection(theirs.detach())


def test_arrays_arrive_as_they_were_and_can_be_written_to() -> None:
    left, right = pair()
    sent = {
        "big": np.arange(1 << 20).reshape(2, -1),
        "none": np.empty((0, 3), np.uint8),
        "text": ["x"],
        "row": np.ones(3),
    }
    thread = threading.Thread(target=lambda: [send(left, sent) for _ in range(2)])
    thread.start()
    for _ in range(2):  # nothing of a message is left in the socket
        found = receive(right)
        assert found["text"] == ["x"]
        for name in ("big", "none", "row"):
            assert np.array_equal(found[name], sent[name]) and found[name].dtype == sent[name].dtype
            assert found[name].shape == sent[name].shape and found[name].flags.writeable
    thread.join()


def test_an_end_inside_a_message_is_an_end() -> None:
    left, right = pair()

    def die() -> None:
        left.send((b"", [1 << 20]))
        left.close()

    thread = threading.Thread(target=die)
    thread.start()
    with pytest.raises(EOFError):
        receive(right)
    thread.join()
