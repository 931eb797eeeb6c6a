"""A process that decodes packs.

It is started as `python -m mmtrain.data.worker`, not by multiprocessing, which would import the training script again,
and torch with it: seconds for every worker, on cores that the model needs.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import numpy as np

from mmtrain.config.errors import DataError
from mmtrain.data.ordering import Planned
from mmtrain.data.reader import Reader
from mmtrain.data.slots import SlotWriter
from mmtrain.data.wire import Channel, planned, reader_spec

PARENT_POLL_SECONDS = 1.0
"""How often a worker looks whether its parent still lives."""


def _follow_parent(parent: int) -> None:
    """End this process as soon as the parent is gone, whatever it was doing."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def main() -> None:
    """Answer packs on a socket until it closes: its file descriptor, that of the slots, their bytes, the parent."""
    # The trainer decides when to stop: it still needs packs while it saves after a signal.
    # srun and launch/stages.py may signal all processes of a rank, and SIGUSR1 would end this one.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    descriptor, memory, slot_bytes, parent = map(int, sys.argv[1:])
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    slots = SlotWriter(memory, slot_bytes)
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        reader = Reader(reader_spec(channel.receive()))
        while True:
            slot, pack = channel.receive()
            channel.send(_answer(reader, list(map(planned, pack)), slots.slot(slot)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(reader: Reader, pack: list[Planned], memory: np.ndarray) -> dict[str, Any]:
    """Decode a pack into its slot; what is left to tell."""
    try:
        arrays, ledger = reader.read(pack, memory)
    except DataError as error:
        return {"error": str(error)}
    except Exception:  # a defect of ours: shown in full by the trainer
        return {"defect": traceback.format_exc()}
    return {"images": len(arrays.panels), "keys": arrays.keys, "ledger": ledger}


if __name__ == "__main__":
    main()
