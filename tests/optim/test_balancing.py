"""What scaling one tower's gradients can and cannot do: nothing to Adam, everything to SGD, and not nothing to a norm
that changes from step to step (Adam's moments weigh the steps)."""

import torch
from torch import nn

STEPS = 100


def displacement(optimizer: str, treat) -> torch.Tensor:
    """How far two towers that share no weight have moved after training; `treat(step, tower)` changes the first's
    gradients."""
    generator = torch.Generator().manual_seed(0)
    towers = [nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)]
    for tower in towers:
        tower.weight.data = torch.randn(4, 8, generator=generator) * 0.3
    start = [tower.weight.detach().clone() for tower in towers]
    weights = [tower.weight for tower in towers]
    step = torch.optim.Adam(weights, lr=1e-2, eps=1e-12) if optimizer == "adam" else torch.optim.SGD(weights, lr=1e-2)
    target = torch.randn(8, 4, generator=generator)
    for _ in range(STEPS):
        seen, read = (torch.randn(16, 8, generator=generator) for _ in range(2))
        loss = (towers[0](seen) + towers[1](read) - seen @ target - read.cos() @ target).square().mean()
        step.zero_grad()
        loss.backward()
        treat(towers[0].weight)
        step.step()
    return torch.cat([(tower.weight - begun).detach().flatten() for tower, begun in zip(towers, start, strict=True)])


def changed(optimizer: str, treat) -> float:
    """Relative change of the whole displacement by the treatment."""
    plain = displacement(optimizer, lambda _: None)
    return float((displacement(optimizer, treat) - plain).norm() / plain.norm())


def five_times(weight: nn.Parameter) -> None:
    weight.grad *= 5


def unit_norm(weight: nn.Parameter) -> None:
    weight.grad /= weight.grad.norm()


def test_a_constant_factor_on_one_towers_gradients_is_nothing_to_adam():
    assert changed("adam", five_times) < 1e-4


def test_the_same_factor_is_another_training_to_sgd():
    assert changed("sgd", five_times) > 0.5


def test_a_factor_that_follows_the_norm_of_each_step_is_something_to_adam():
    assert 1e-3 < changed("adam", unit_norm) < 0.5
