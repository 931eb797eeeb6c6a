"""The fused AdamW is AdamW. That layouts with it equal plain PyTorch is in test_layouts.py."""

import pytest
import torch

from mmtrain.config.schema import Optim
from mmtrain.parallel.optimizer import make_optimizer

OPTIM = Optim(lr=3e-3, beta1=0.8, beta2=0.95, eps=1e-6)
GROUPS = ((1e-2, 0.1, 1e-6), (3e-4, 0.0, 1e-3))
"""lr, decay and eps of two groups, as muP makes them differ."""


def groups() -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"params": [torch.nn.Parameter(torch.randn(1001, generator=draw))], **hyper}
        for hyper in (dict(zip(("lr", "weight_decay", "eps"), row, strict=True)) for row in GROUPS)
    ]


def test_one_pass_over_memory_is_the_textbook_rule():
    found, wanted = groups(), [group["params"][0].detach().double() for group in groups()]
    optimizer = make_optimizer(OPTIM, found, torch.device("cpu"))
    assert all(group["fused"] for group in optimizer.param_groups)
    moments = [(torch.zeros(1001).double(), torch.zeros(1001).double()) for _ in GROUPS]
    draw = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        for (lr, decay, eps), group, p, (m, v) in zip(GROUPS, found, wanted, moments, strict=True):
            grad = torch.randn(1001, generator=draw) * 10.0**-step
            group["params"][0].grad = grad.clone()
            m.add_((1 - OPTIM.beta1) * (grad.double() - m))
            v.add_((1 - OPTIM.beta2) * (grad.double().square() - v))
            p.mul_(1 - lr * decay)
            p.sub_(lr * (m / (1 - OPTIM.beta1**step)) / ((v / (1 - OPTIM.beta2**step)).sqrt() + eps))
        optimizer.step()
    for group, p, (m, v) in zip(found, wanted, moments, strict=True):
        state = optimizer.state[group["params"][0]]
        for value, exact in ((group["params"][0].detach(), p), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
            assert float((value - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("cuda", True), ("xpu", False), ("mps", False)])
def test_it_is_fused_where_torch_has_that(device, fused):
    optimizer = make_optimizer(OPTIM, groups(), torch.device(device))
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is fused


def test_sgd_has_no_momentum():
    found = groups()
    start = found[0]["params"][0].detach().clone()
    found[0]["params"][0].grad = torch.ones(1001)
    optimizer = make_optimizer(Optim(name="sgd", lr=1.0), found, torch.device("cpu"))
    optimizer.step()
    assert torch.allclose(found[0]["params"][0], start - 1e-2 * (1 + 0.1 * start)) and not optimizer.state
