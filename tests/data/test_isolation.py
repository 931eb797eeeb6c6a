"""A packed document is alone: what stands in one changes nothing in the others, to the last bit."""

import pytest
import torch

from mmtrain.config.tokens import TokenKind
from mmtrain.model.stepio import first_inputs
from tests.model.small import DENSE, built, micro

PACKS = [[("it", 1), ("tit", 2), ("t", 2)], [("itit", 3), ("t", 4)]]
LENGTH = 32


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_a_document_changes_no_logit_of_the_others(changed: int) -> None:
    net, batch = built(DENSE), micro(DENSE, PACKS, LENGTH)
    inputs, at = first_inputs(DENSE), torch.arange(2 * LENGTH)
    before = net(batch, inputs, logits_at=at).view(2, LENGTH, -1)
    own = torch.zeros(2, LENGTH, dtype=torch.bool)
    own[0] = batch.document_ids[0] == changed
    words = own & (batch.kind == TokenKind.TEXT)
    batch.tokens[words] = (batch.tokens[words] + 1) % 50
    for number, slots in enumerate(batch.image_slots):
        if own.flatten()[slots[0]]:
            batch.images[number] = 255 - batch.images[number]
    after = net(batch, inputs, logits_at=at).view(2, LENGTH, -1)
    others = ~own & (batch.document_ids >= 0)
    assert torch.equal(before[others], after[others]) and others.any()
    assert (before[own] != after[own]).any(-1).all()
