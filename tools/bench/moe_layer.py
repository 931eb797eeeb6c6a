"""Speed of the sparse layer: forward + backward against a dense MLP of equal active FLOPs, and against CuMo's loop.

    python -m tools.bench.moe_layer [--threads 2] [--seconds 20] [--save]

Prints one JSON line; --save keeps it in tools/bench/results/. The competitors run in turn (sparse, dense, loop,
sparse, ...) and each round gives ratios of neighbours in time; the medians over rounds are reported. A ratio above 1
means that the sparse layer is faster. The loop is the one in CuMo's vision and connector layers (arXiv:2405.05949):
over images, over experts, torch.where.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from launch.entry import setup
from mmtrain.config.schema import Moe
from mmtrain.model.mlp import Activation, Mlp
from mmtrain.model.moe import SparseMlp
from mmtrain.model.router import RouterInput
from tools.bench.record import tell


@dataclass(frozen=True)
class Shape:
    """One case: `images` leading rows of `tokens`, width, width inside an expert."""

    images: int
    tokens: int
    width: int
    ffn: int
    num_experts: int
    top_k: int
    activation: Activation = "gelu"


SHAPES = {
    "vision": Shape(8, 577, 1024, 4096, 4, 2),
    "small": Shape(4, 512, 256, 512, 16, 2),
}


class ImageLoop(nn.Module):
    """What CuMo does: a Python loop over images and experts, each with torch.where and an indexed sum."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.gate = nn.Linear(shape.width, shape.num_experts, bias=False)
        mlps = (Mlp(shape.width, shape.ffn, shape.width, shape.activation, True) for _ in range(shape.num_experts))
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, tokens, width] -> the same shape."""
        gates, expert_ids = self.gate(x).softmax(-1).topk(self.top_k)
        gates = gates / gates.sum(-1, keepdim=True)
        results = torch.zeros_like(x)
        for image in range(x.shape[0]):
            for i, expert in enumerate(self.experts):
                token, choice = torch.where(expert_ids[image] == i)
                weight = gates[image, token, choice].unsqueeze(1)
                results[image, token] += weight * expert(x[image, token])
        return results


def fill(module: nn.Module) -> None:
    """Values that keep activations of order 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def competitors(shape: Shape) -> dict[str, Callable[[], None]]:
    """One forward + backward of each layer on the same input, gradients of all parameters and of the input."""
    torch.manual_seed(0)
    moe = Moe(num_experts=shape.num_experts, top_k=shape.top_k)
    sparse = SparseMlp(moe, shape.width, shape.ffn, shape.width, shape.activation, True)
    dense = Mlp(shape.width, shape.ffn * shape.top_k, shape.width, shape.activation, True)
    loop = ImageLoop(shape)
    x = torch.randn(shape.images, shape.tokens, shape.width, requires_grad=True)
    grad = torch.randn(x.shape)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    share = torch.full((shape.num_experts,), 1 / shape.num_experts)
    router_input = RouterInput(share, torch.tensor(float(valid.numel())), torch.zeros(shape.num_experts))

    def run_sparse() -> None:
        routed = sparse(x, valid, router_input)
        torch.autograd.backward([routed.out, 0.01 * routed.balance + 0.001 * routed.z], [grad, None])

    runs = {"sparse": run_sparse, "dense": lambda: dense(x).backward(grad), "loop": lambda: loop(x).backward(grad)}
    for module in (sparse, dense, loop):
        fill(module)

    def once(run: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            run()
            for tensor in (x, *sparse.parameters(), *dense.parameters(), *loop.parameters()):
                tensor.grad = None

        return timed

    return {name: once(run) for name, run in runs.items()}


def measure(shape: Shape, seconds: float) -> dict[str, float]:
    """Median ratios and median seconds of one case, over as many rounds as fit, at least 3."""
    runs = competitors(shape)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["sparse"]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = statistics.median
    return {
        "of_dense": round(median(d / s for d, s in zip(times["dense"], times["sparse"], strict=True)), 3),
        "of_loop": round(median(o / s for o, s in zip(times["loop"], times["sparse"], strict=True)), 3),
        "rounds": len(times["sparse"]),
        **{f"{name}_seconds": round(median(values), 5) for name, values in times.items()},
    }


def main() -> None:
    """Parse, measure, print."""
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=40, help="time of each shape, warm-up apart")
    parser.add_argument("--save", action="store_true", help="keep the result in tools/bench/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"bench": "moe_layer", "threads": args.threads, "torch": torch.__version__}
    result["load_before"] = round(os.getloadavg()[0], 2)  # ratios of two threads on busy cores mean little
    result |= {name: measure(shape, args.seconds) for name, shape in SHAPES.items()}
    tell(result, args.save)


if __name__ == "__main__":
    main()
