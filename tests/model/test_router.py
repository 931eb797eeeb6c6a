"""Router losses are their textbook formulas, see valid tokens alone, and do not depend on how a batch is split."""

import pytest
import torch

from mmtrain.config.schema import Moe
from mmtrain.model.router import Router, RouterInput, RouterLosses, choose, losses

E, K, D = 5, 2, 8
SHARE = torch.tensor([0.5, 0.2, 0.1, 0.15, 0.05])


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [4, 6, E] of distinct tokens and a valid mask whose rows hold 6, 4, 1 and 0 tokens."""
    logits = 2 * torch.randn(4, 6, E, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(6) < torch.tensor([6, 4, 1, 0]).unsqueeze(1)
    return logits, valid


def measure(moe: Moe, logits: torch.Tensor, valid: torch.Tensor, total: float) -> RouterLosses:
    bias = torch.zeros(E)
    choice = choose(moe, logits.reshape(-1, E), bias)
    return losses(moe, choice, valid, RouterInput(SHARE, torch.tensor(total), bias))


def shares(logits: torch.Tensor) -> torch.Tensor:
    """Share of all choices that each expert gets from tokens [n, E]."""
    chosen = torch.zeros_like(logits)
    for token, row in zip(logits, chosen, strict=True):
        row[token.argsort(descending=True)[:K]] = 1 / K
    return chosen.mean(0)


def test_gates_are_entries_of_the_softmax_where_a_layer_does_not_renormalise() -> None:
    logits, _ = case()
    logits = logits.reshape(-1, E)
    kept = choose(Moe(num_experts=E, top_k=K, renormalize=False), logits, torch.zeros(E))
    whole = choose(Moe(num_experts=E, top_k=K), logits, torch.zeros(E))
    assert torch.equal(kept.expert_ids, whole.expert_ids)
    torch.testing.assert_close(kept.gates, logits.softmax(-1).topk(K).values)
    torch.testing.assert_close(kept.gates / kept.gates.sum(-1, keepdim=True), whole.gates)


def test_z_loss_is_the_mean_square_of_logsumexp_over_valid_tokens() -> None:
    logits, valid = case()
    z = measure(Moe(num_experts=E, top_k=K), logits, valid, 11.0).z
    torch.testing.assert_close(z, logits[valid].exp().sum(-1).log().square().mean())


def test_balance_of_a_step_takes_the_given_shares() -> None:
    logits, valid = case()
    balance = measure(Moe(num_experts=E, top_k=K), logits, valid, 11.0).balance
    torch.testing.assert_close(balance, E * (SHARE * logits[valid].softmax(-1).mean(0)).sum())


def test_balance_of_sequences_is_the_switch_loss_of_each_row_weighted_by_its_tokens() -> None:
    logits, valid = case()
    moe = Moe(num_experts=E, top_k=K, balance_scope="sequence")
    balance = measure(moe, logits, valid, 11.0).balance
    expected = torch.zeros(())
    for row, mask in zip(logits, valid, strict=True):
        if mask.any():
            row = row[mask]
            expected += len(row) / 11 * E * (shares(row) * row.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(balance, expected)


def test_even_use_has_balance_one_in_both_scopes() -> None:
    logits = torch.stack([torch.roll(torch.tensor([50.0, 50.0, 0.0, 0.0]), i) for i in range(8)]).unsqueeze(0)
    valid = torch.ones(1, 8, dtype=torch.bool)
    inputs = RouterInput(torch.full((4,), 0.25), torch.tensor(8.0), torch.zeros(4))
    for scope in ("step", "sequence"):
        moe = Moe(num_experts=4, top_k=2, balance_scope=scope)
        balance, _, counts, _ = losses(moe, choose(moe, logits[0], inputs.bias), valid, inputs)
        torch.testing.assert_close(balance, torch.tensor(1.0))
        assert counts.tolist() == [4, 4, 4, 4]


def test_counts_and_probabilities_are_sums_over_valid_tokens() -> None:
    logits, valid = case()
    logits.requires_grad_(True)
    _, _, counts, probability = measure(Moe(num_experts=E, top_k=K), logits, valid, 11.0)
    torch.testing.assert_close(counts, shares(logits[valid]).detach() * 11 * K)
    torch.testing.assert_close(probability, logits[valid].softmax(-1).sum(0).detach())
    assert not counts.requires_grad and not probability.requires_grad


@pytest.mark.parametrize("balance", ["bias", "none"])
def test_balance_is_zero_unless_it_is_a_loss(balance: str) -> None:
    logits, valid = case()
    value, z, _, probability = measure(Moe(num_experts=E, top_k=K, balance=balance), logits, valid, 11.0)
    assert value == 0
    assert z > 0
    torch.testing.assert_close(probability, logits[valid].softmax(-1).sum(0))


@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_what_invalid_tokens_hold_changes_nothing(scope: str) -> None:
    moe = Moe(num_experts=E, top_k=K, balance_scope=scope)
    logits, valid = case()
    other = torch.where(valid.unsqueeze(-1), logits, torch.randn_like(logits) * 30)
    for a, b in zip(measure(moe, logits, valid, 11.0), measure(moe, other, valid, 11.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_splitting_the_batch_changes_neither_losses_nor_gradients(scope: str) -> None:
    """The sum over micro-batches, given the same RouterInput, is the value of the whole batch."""
    moe = Moe(num_experts=E, top_k=K, balance_scope=scope)
    router = Router(D, E)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(4, 6, D)
    _, valid = case()

    def total(parts: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        values = [measure(moe, router(x[part]), valid[part], 11.0) for part in parts]
        loss = sum(0.1 * balance + 0.01 * z for balance, z, *_ in values)
        return loss.detach(), torch.autograd.grad(loss, router.weight)[0]

    whole = total([slice(0, 4)])
    for parts in ([slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in (3, 1, 0, 2)]):
        for a, b in zip(total(parts), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scope", ["step", "sequence"])
def test_a_global_batch_without_valid_tokens_has_losses_of_zero(scope: str) -> None:
    logits, valid = case()
    logits.requires_grad_(True)
    moe = Moe(num_experts=E, top_k=K, balance_scope=scope)
    balance, z, counts, probability = measure(moe, logits, torch.zeros_like(valid), 0.0)
    assert (balance, z, counts.sum(), probability.sum()) == (0, 0, 0, 0)
    (gradient,) = torch.autograd.grad(balance + z, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_gates_are_the_renormalised_softmax() -> None:
    logits, _ = case()
    choice = choose(Moe(num_experts=E, top_k=3), logits.view(-1, E), torch.zeros(E))
    best, ids = logits.view(-1, E).softmax(-1).topk(3)
    assert torch.equal(choice.expert_ids, ids)
    torch.testing.assert_close(choice.gates, best / best.sum(-1, keepdim=True))


def test_router_computes_in_float32() -> None:
    router = Router(D, E).bfloat16()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(3, D).bfloat16()
    logits = router(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.weight.float().t())
