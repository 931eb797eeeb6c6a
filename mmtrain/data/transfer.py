"""Micro-batches on their way to the device."""

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from mmtrain.data.record import Batch


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on `device`, in order.

    On a GPU each but the first is copied, from pinned memory and on a stream of its own, while the model works on the
    one before it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copying, working = _copying(device), torch.cuda.current_stream(device)

    def start(batch: Batch) -> Batch:
        with torch.cuda.stream(copying):
            return batch.pinned().to(device)

    following = start(batches[0])
    for after in (*batches[1:], None):
        working.wait_stream(copying)
        ready = following
        for tensor in ready.tensors().values():
            tensor.record_stream(working)  # its memory is free for others only when the model is done with it
        if after is not None:
            following = start(after)
        yield ready


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies to a device: memory that one stream has freed is not given to another."""
    return torch.cuda.Stream(device)
