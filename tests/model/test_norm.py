"""Norms against their textbook formulas."""

import pytest
import torch
import torch.nn.functional as F

from mmtrain.model.norm import CrmsNorm, LayerNorm, RmsNorm, decoder_norm
from tests.model.small import fill

EPS = 1e-3  # large, so that a wrong place of eps shows


def textbook_rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def gradients(function, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    return [out, *torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).cos()).sum(), (x, weight))]


@pytest.mark.parametrize("shape", [(1, 10), (6, 10), (2, 5, 3, 10)])
def test_rms_norm_is_its_formula_with_gradients(shape: tuple[int, ...]) -> None:
    norm = fill(RmsNorm(10, EPS))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = gradients(norm, x, norm.weight)
    theirs = gradients(lambda x: textbook_rms(x, norm.weight), x, norm.weight)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_rms_norm_in_bf16_is_the_fp32_norm_rounded() -> None:
    norm = fill(RmsNorm(64, EPS))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = textbook_rms(x.float(), norm.weight.bfloat16().float())
    got = norm.bfloat16()(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)


def test_crms_norm_is_layer_norm_of_the_mean_free_vector_it_stands_for() -> None:
    norm = fill(CrmsNorm(10, EPS))
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))

    def twin(x: torch.Tensor) -> torch.Tensor:
        whole = torch.cat((x, -x.sum(-1, keepdim=True)), -1)
        return F.layer_norm(whole, (11,), eps=EPS)[:, :10] * norm.weight

    for got, want in zip(gradients(norm, x, norm.weight), gradients(twin, x, norm.weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_its_formula(bias: bool) -> None:
    norm = fill(LayerNorm(10, EPS, bias))
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    centred = x - x.mean(-1, keepdim=True)
    want = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + EPS) * norm.weight
    torch.testing.assert_close(norm(x), want + norm.bias if bias else want)


@pytest.mark.parametrize(("kind", "cls"), [("rms", RmsNorm), ("layer", LayerNorm), ("crms", CrmsNorm)])
def test_decoder_norms_have_a_gain_and_no_bias(kind: str, cls: type) -> None:
    norm = decoder_norm(kind, 8, EPS)
    assert isinstance(norm, cls)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
