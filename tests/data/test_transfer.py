from contextlib import nullcontext

import pytest
import torch

from mmtrain.data.batch import stack
from mmtrain.data.record import Batch
from mmtrain.data.transfer import on_device
from tests.data.test_collate import SHAPE, packs


def batches() -> list[Batch]:
    return [stack([pack], SHAPE, num_sources=2) for pack in packs()]


def test_batches_arrive_in_order() -> None:
    sent = batches()
    for before, after in zip(sent, on_device(sent, torch.device("cpu")), strict=True):
        assert after.keys == before.keys
        assert after.tensors().keys() == before.tensors().keys() >= {"tokens", "images", "image_slots"}
        assert all(torch.equal(tensor, before.tensors()[name]) for name, tensor in after.tensors().items())


def test_on_a_gpu_the_next_copy_begins_before_the_model_gets_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: what is checked is the order of calls, every device function being a stand-in."""
    sent, events, kept, made = batches(), [], set(), []

    class Stream:
        def __init__(self, _: object = None) -> None:
            made.append(self)

        def wait_stream(self, _: object) -> None:
            events.append("wait")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    working = Stream()
    made.clear()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: working)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: kept.add(id(tensor)))
    monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
    monkeypatch.setattr(Batch, "to", lambda batch, _: (events.append(f"copy {sent.index(batch)}"), batch)[1])
    monkeypatch.setattr(Batch, "__eq__", lambda batch, other: batch is other)
    device = torch.device("cuda", 9)  # of this test alone: its stream is kept
    for number, batch in enumerate(on_device(sent[:3], device)):
        assert batch is sent[number]
        assert kept >= {id(tensor) for tensor in batch.tensors().values()}, "memory given to others while it is read"
        events.append(f"model {number}")
    assert events == ["copy 0", "wait", "copy 1", "model 0", "wait", "copy 2", "model 1", "wait", "model 2"]
    list(on_device(sent[:1], device))
    assert len(made) == 1, "each step would reserve memory of its own for its copies"
