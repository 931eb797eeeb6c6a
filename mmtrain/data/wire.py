"""Messages between a training process and its decoding processes: JSON on a socket, nothing that could run.

A message is a line. Tokens and pixels do not travel: a worker writes them where the trainer reads them
(mmtrain.data.slots).

    trainer -> worker   the ReaderSpec, once; then [slot, [Planned, ...]] for each pack
    worker -> trainer   {"images", "keys", "ledger"} of a pack in its slot, or {"error"}, or {"defect"}: a traceback
"""

import json
import socket
from collections.abc import Mapping
from typing import Any

from mmtrain.config.schema import LossWeights
from mmtrain.data.collate import Shape
from mmtrain.data.image import Canvas
from mmtrain.data.ordering import Planned
from mmtrain.data.pack import Cut
from mmtrain.data.reader import ReaderSpec

_encode = json.JSONEncoder(separators=(",", ":")).encode


def line_of(message: Any) -> bytes:
    """A message, which JSON can hold, as it travels."""
    return _encode(message).encode() + b"\n"


class Channel:
    """One end of a socket between two processes."""

    def __init__(self, end: socket.socket) -> None:
        """Takes the socket over."""
        self._end = end
        self._lines = end.makefile("rb")

    def send(self, message: Any) -> None:
        """Send what JSON can hold; OSError if the other side is gone."""
        self.send_line(line_of(message))

    def send_line(self, line: bytes) -> None:
        """Send what line_of made."""
        self._end.sendall(line)

    def receive(self) -> Any:
        """What the other side sends next; EOFError or OSError if it is gone."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def close(self) -> None:
        """Close this end."""
        self._lines.close()
        self._end.close()


def reader_spec(fields: Mapping[str, Any]) -> ReaderSpec:
    """Undo dataclasses.asdict and JSON."""
    shape = fields["shape"]
    return ReaderSpec(
        **{
            **fields,
            "shape": Shape(**{**shape, "canvas": Canvas(*shape["canvas"])}),
            "sources": tuple(fields["sources"]),
            "loss_weights": LossWeights(**fields["loss_weights"]),
        }
    )


def planned(row: list[Any]) -> Planned:
    """Undo JSON, which makes lists of tuples."""
    document = Planned(*row)
    return document._replace(cut=Cut(*document.cut)) if document.cut else document
