"""What ranks do in the tests of conversion: fill their part of a model from a pretrained folder, and answer."""

from pathlib import Path

import torch

from mmtrain.assemble import blueprint
from mmtrain.config.load import dump, load
from mmtrain.config.schema import Recipe
from mmtrain.data.record import Batch
from mmtrain.model.balance import RouterState
from mmtrain.model.stepio import first_inputs
from mmtrain.parallel.groups import connect
from mmtrain.parallel.materialize import fill
from mmtrain.parallel.tensor import shard
from mmtrain.run.manifest import RunState
from mmtrain.run.saver import Saver
from mmtrain.weights import Weights
from tests.convert.cases import greedy
from tests.parallel import harness

Case = tuple[str, list[str], Batch, Batch]
"""Recipe, overrides, batch whose logits are wanted, batch to continue."""


def answers(cases: list[Case], new_tokens: int) -> list[tuple[torch.Tensor, list[list[int]]]]:
    """Logits [B * T, V] and greedy continuations of each case. All cases have the same layout."""
    groups = connect(load(*cases[0][:2]).parallel)
    out = []
    for path, overrides, batch, prompt in cases:
        recipe = load(path, overrides)
        model, registry = blueprint(recipe)
        fill(model, shard(model, groups), Weights(recipe, registry, groups).make, groups.device)
        inputs = first_inputs(recipe.model)
        model.eval()

        def forward(batch, at, cache, model=model, inputs=inputs):
            with torch.no_grad():
                return model(batch, inputs, at, cache)

        logits = forward(batch, torch.arange(batch.tokens.numel()), None)
        out.append((logits, greedy(forward, prompt, recipe.model.decoder.num_layers, new_tokens)))
    groups.close()
    return out


def norm_over_all_heads(width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(wanted, got): output and gradients of a norm over `width`, whole and split over two ranks."""
    from mmtrain.config.schema import Parallel
    from mmtrain.model.norm import RmsNorm
    from mmtrain.parallel.layers import SplitNorm

    groups = connect(Parallel(tensor=2))
    generator = torch.Generator().manual_seed(0)
    x, gain, pull = (torch.randn(5, width, generator=generator) for _ in range(3))
    whole = RmsNorm(width, 1e-5)
    whole.weight.data.copy_(gain[0])
    own = slice(groups.tensor_rank * width // 2, (groups.tensor_rank + 1) * width // 2)
    split = SplitNorm(torch.nn.Parameter(gain[0, own].clone()), 1e-5, groups.tensor)
    both = []
    for norm, part in ((whole, slice(None)), (split, own)):
        given = x[:, part].clone().requires_grad_()
        y = norm(given)
        both.append([y.detach(), *torch.autograd.grad((y * pull[:, part]).sum(), (given, norm.weight))])
    groups.close()
    return [tensor[..., own] for tensor in both[0]], both[1]


STEPS = 3


def save_trained(folder: str, recipe: Recipe, tokenizer: bytes) -> None:
    """On a rank: STEPS steps of `recipe` under its layout, then a checkpoint."""
    groups = connect(recipe.parallel)
    engine = harness.build(recipe, groups)
    harness.train(recipe, groups, STEPS, accumulation=1, engine=engine)
    state = RunState(engine.updates, dump(recipe), {}, "", routers=RouterState.first(recipe.model).as_json())
    saver = Saver(Path(folder), groups)
    saver.save(STEPS, engine.pieces(), state, {"tokenizer.json": tokenizer})
    saver.wait()
    groups.close()
