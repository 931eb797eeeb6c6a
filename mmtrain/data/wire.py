"""Objects through a socket between two processes of ours, arrays without a copy on either side.

A message is a small pickle, with the lengths of the arrays' bytes, and then these bytes as they lie in memory: the
kernel copies them twice, nobody else does. Only ever used between a process and the workers that it started.
"""

import os
import pickle
from multiprocessing.connection import Connection
from typing import Any

import numpy as np


def send(connection: Connection, value: object) -> None:
    """Send `value`; OSError if the other side is gone."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((data, [view.nbytes for view in views]))
    for view in views:
        while view.nbytes:
            view = view[os.write(connection.fileno(), view) :]


def receive(connection: Connection) -> Any:
    """What the other side sends next; EOFError or OSError if it is gone."""
    data, lengths = connection.recv()
    buffers = [np.empty(length, np.uint8) for length in lengths]
    for buffer in buffers:
        view = memoryview(buffer)
        while view.nbytes:
            count = os.readv(connection.fileno(), [view])
            if not count:
                raise EOFError
            view = view[count:]
    return pickle.loads(data, buffers=buffers)
