"""The chunked loss against whole logits and F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from mmtrain.model import loss as loss_module
from mmtrain.model.loss import LanguageHead
from tests.model.small import fill

ROWS, WIDTH, VOCAB, PADDED, SOURCES = 50, 12, 100, 128, 3


def case(weights_zero: bool = False) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=draw, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    weights = torch.rand(ROWS, generator=draw) * (torch.rand(ROWS, generator=draw) > 0.4)
    source_ids = torch.randint(0, SOURCES, (ROWS,), generator=draw)
    return hidden, labels, torch.zeros_like(weights) if weights_zero else weights, source_ids


def head(scale: float = 1.0) -> LanguageHead:
    return fill(LanguageHead(WIDTH, VOCAB, PADDED, scale))


def textbook(hidden, weight, labels, weights, scale=1.0):
    logits = (hidden * scale) @ weight.t()
    logits = torch.cat((logits[:, :VOCAB], torch.full_like(logits[:, VOCAB:], -torch.inf)), 1)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_values_and_gradients_are_those_of_cross_entropy(
    chunk: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * VOCAB)
    module = head(scale)
    hidden, labels, weights, source_ids = case()
    language_sum, by_sum, by_weight = module(hidden, labels, weights, source_ids, SOURCES)
    want = textbook(hidden, module.weight, labels, weights, scale)
    torch.testing.assert_close(language_sum, want, rtol=1e-6, atol=1e-5)
    got_gradients = torch.autograd.grad(language_sum / 7, (hidden, module.weight))
    for got, expected in zip(got_gradients, torch.autograd.grad(want / 7, (hidden, module.weight)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not by_sum.requires_grad and not by_weight.requires_grad
    for source in range(SOURCES):
        own = weights * (source_ids == source)
        torch.testing.assert_close(by_weight[source], own.sum())
        torch.testing.assert_close(by_sum[source], textbook(hidden, module.weight, labels, own, scale).detach())


def test_rows_that_pad_the_vocabulary_have_no_influence_and_no_gradient() -> None:
    module = head()
    hidden, labels, weights, source_ids = case()
    with torch.no_grad():
        module.weight[VOCAB:] = torch.nan
    language_sum, *_ = module(hidden, labels, weights, source_ids, SOURCES)
    language_sum.backward()
    assert torch.isfinite(language_sum)
    assert (module.weight.grad[VOCAB:] == 0).all()
    assert torch.isfinite(hidden.grad).all()
    assert module(hidden).shape == (ROWS, VOCAB)
    assert torch.isfinite(module(hidden)).all()


def test_without_a_single_label_the_gradient_is_zero_not_missing() -> None:
    module = head()
    hidden, labels, weights, source_ids = case(weights_zero=True)
    language_sum, by_sum, by_weight = module(hidden, labels, weights, source_ids, SOURCES)
    language_sum.backward()
    assert language_sum.item() == 0 and by_sum.tolist() == by_weight.tolist() == [0.0] * SOURCES
    assert (module.weight.grad == 0).all() and (hidden.grad == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    module = head()
    hidden, labels, weights, source_ids = case()
    want = dict(
        zip(
            ("hidden", "weight"),
            torch.autograd.grad(textbook(hidden, module.weight, labels, weights), (hidden, module.weight)),
            strict=True,
        )
    )
    hidden = hidden.detach().requires_grad_(frozen != "hidden")
    module.weight.requires_grad_(frozen != "weight")
    module(hidden, labels, weights, source_ids, SOURCES)[0].backward()
    got = {"hidden": hidden.grad, "weight": module.weight.grad}
    assert got.pop(frozen) is None
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-6)


def test_logits_are_scaled_and_in_fp32() -> None:
    module = head(0.5)
    hidden, *_ = case()
    torch.testing.assert_close(module(hidden), 0.5 * hidden @ module.weight[:VOCAB].t())
    assert module.bfloat16()(hidden.bfloat16()).dtype == torch.float32


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Watches how many entries the largest tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_no_tensor_ever_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, chunk = 4096, 16
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * VOCAB)
    module = head()
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    with LargestTensor() as watch:
        module(hidden, torch.zeros(rows, dtype=torch.int64), torch.ones(rows), torch.zeros(rows, dtype=torch.int64))[
            0
        ].backward()
    assert watch.entries == rows * WIDTH  # the hidden states themselves
    assert watch.entries < rows * VOCAB


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("learning", "products"), [(True, 3), (False, 1)])
def test_measuring_without_gradients_makes_none(learning: bool, products: int) -> None:
    module, inputs = head(), case()
    with Products() as watch, torch.set_grad_enabled(learning):
        module(*inputs, SOURCES)
    assert watch.count == products


def test_bf16_keeps_the_gradient_of_the_weight_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, weights, source_ids = case()
    results = []
    for rows in (1, 1000):  # summing 50 chunks in bf16 would lose digits
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", rows * VOCAB)
        module = head().bfloat16()
        module(hidden.detach().bfloat16(), labels, weights, source_ids, SOURCES)[0].backward()
        assert module.weight.grad.dtype == torch.bfloat16
        results.append(module.weight.grad.float())
    assert (results[0] - results[1]).norm() <= 4e-3 * results[1].norm()


def test_a_tied_head_adds_to_the_gradient_of_the_embedding() -> None:
    embedding = torch.nn.Parameter(head().weight.detach().clone())
    module = LanguageHead(WIDTH, VOCAB, PADDED, tied=embedding)
    assert module.weight is embedding
    _, labels, weights, source_ids = case()
    tokens = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(5))
    module(F.embedding(tokens, embedding), labels, weights, source_ids, SOURCES)[0].backward()
    (want,) = torch.autograd.grad(textbook(embedding[tokens], embedding, labels, weights), embedding)
    torch.testing.assert_close(embedding.grad, want, rtol=1e-5, atol=1e-6)
