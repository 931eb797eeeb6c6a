"""A process that decodes packs.

It is started as `python -m mmtrain.data.worker`, not by multiprocessing, which would import the training script again,
and torch with it: seconds for every worker, on cores that the model needs. Packs travel through one socket; pickle is
used between these two processes only, never on anything from a file.
"""

import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

from mmtrain.config.errors import DataError
from mmtrain.data.reader import Reader, ReadPack
from mmtrain.data.wire import send

PARENT_POLL_SECONDS = 1.0
"""How often a worker looks whether its parent still lives."""


def _follow_parent(parent: int) -> None:
    """End this process as soon as the parent is gone, whatever it was doing."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def main() -> None:
    """Answer packs on the socket given as file descriptor until it closes."""
    # The trainer decides when to stop: it still needs packs while it saves after a signal.
    # srun and launch/stages.py may signal all processes of a rank, and SIGUSR1 would end this one.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    with Connection(descriptor) as connection:
        try:
            reader = Reader(connection.recv())
            while True:
                pack = connection.recv()
                try:
                    answer: ReadPack | DataError | str = reader.read(pack)
                except DataError as error:
                    answer = error
                except Exception:  # a defect of ours: shown in full by the trainer
                    answer = traceback.format_exc()
                send(connection, answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
