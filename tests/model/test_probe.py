"""The probe changes nothing and reports the gradient that passes it, by token kind."""

import pytest
import torch

from mmtrain.config.tokens import TokenKind
from mmtrain.model.probe import GradientProbe

KIND = torch.tensor([[TokenKind.TEXT, TokenKind.IMAGE, TokenKind.PADDING], [TokenKind.IMAGE, TokenKind.TEXT, 1]])


def loss(x: torch.Tensor) -> torch.Tensor:
    """Something whose gradient at x is easily written down: 2 * coefficient * x."""
    coefficient = torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 3.0]])
    return (coefficient.unsqueeze(-1) * x.square()).sum()


def test_squares_are_those_of_the_gradient_and_add_up_over_micro_batches():
    probe = GradientProbe()
    assert probe.squares().tolist() == [0.0, 0.0] and not probe.squares().requires_grad
    x = torch.tensor([[[3.0, 4.0]] * 3, [[1.0, 0.0]] * 3], requires_grad=True)
    for _ in range(2):
        loss(probe(x * 1.0, KIND)).backward()
    text = (2 * 5) ** 2 + 2**2 + 6**2
    image = (4 * 5) ** 2 + 1**2
    assert probe.squares().tolist() == pytest.approx([2.0 * text, 2.0 * image])


def test_a_gradient_passes_to_the_bit():
    draw = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 3, 4, generator=draw).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    loss((x * 1.7).tanh()).backward()
    probe = GradientProbe()
    seen = probe((other * 1.7).tanh(), KIND)
    loss(seen).backward()
    assert other.grad.equal(x.grad) and probe.squares().min() > 0


def test_it_looks_also_where_nothing_below_learns():
    """Both towers and the embedding frozen: the input has no graph, the gradient at it is as large all the same."""
    probe = GradientProbe()
    x = torch.ones(2, 3, 2)
    loss(probe(x, KIND)).backward()
    assert probe.squares().tolist() == pytest.approx([2 * (2**2 + 2**2 + 6**2), 2 * (4**2 + 1**2)]) and x.grad is None


def test_without_gradients_it_is_nothing():
    probe = GradientProbe()
    with torch.no_grad():
        assert probe(torch.ones(2, 3, 2), KIND).equal(torch.ones(2, 3, 2))
    assert probe.squares().tolist() == [0.0, 0.0]


def test_half_precision_is_summed_in_full():
    probe = GradientProbe()
    x = torch.full((1, 4096, 8), 1.0, dtype=torch.bfloat16)
    (probe(x, torch.full((1, 4096), TokenKind.TEXT)) * 0.0625).sum().backward()
    assert probe.squares().tolist() == pytest.approx([4096 * 8 * 0.0625**2, 0.0])
