"""Several ranks in one process, a thread each, with the Comm that run/ asks for; and pieces cut in any way."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from mmtrain.parallel.box import Box, Piece
from mmtrain.run.manifest import RunState

STATE = RunState(
    optimizer_steps=7,
    recipe="name: tiny\n",
    mesh={"world": 1, "tensor": 1, "expert": 1},
    registry_hash="abc123",
    cursor={"step": 7, "sources": {"captions": [3, 1]}},
    routers={"decoder": {"load_share": [[0.1, 0.9]], "bias": [[0.0, 0.0]]}},
    metrics={"held_out_loss": 2.5},
)


class ThreadComm:
    """Rank `rank` of `world` threads that share `board`."""

    def __init__(self, rank: int, world: int, board: list[Any], gate: threading.Barrier):
        self.rank, self.world, self._board, self._gate = rank, world, board, gate

    def barrier(self) -> None:
        self._gate.wait(timeout=30)

    def all_gather_object(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._gate.wait(timeout=30)
        values = list(self._board)
        self._gate.wait(timeout=30)
        return values


def on_ranks(world: int, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """Run `work` on every rank; results, or exceptions, by rank."""
    board: list[Any] = [None] * world
    results: list[Any] = [None] * world
    gate = threading.Barrier(world)

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, world, board, gate))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def whole(name: str, tensor: torch.Tensor, kind: str = "param", step: int = 0) -> Piece:
    """One piece that is the tensor."""
    box = Box.whole(tensor.shape)
    return Piece(name, kind, tuple(tensor.shape), box, (0, box.numel), tensor.reshape(-1), step)


def part(name: str, tensor: torch.Tensor, box: Box, flat: tuple[int, int], kind: str = "param") -> Piece:
    """The elements `flat` of `box`."""
    elements = tensor[box.slices()].reshape(-1)[flat[0] : flat[1]]
    return Piece(name, kind, tuple(tensor.shape), box, flat, elements)


def tiny_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a model of a few values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"decoder.norm.weight": (3,), "decoder.embedding.weight": (5, 3), "scalar": (), "e.experts.up": (2, 3, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
