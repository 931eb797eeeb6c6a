"""The laws beside a transferred value."""

import pytest

from mmtrain.mup.laws import mm1_lr, mm1_weight_decay, step_law_batch, step_law_lr


def test_laws_give_the_papers_own_examples():
    # MM1, section 3.3: 30B parameters -> 2.2e-5; its decay is a tenth of the rate.
    assert mm1_lr(30e9) == pytest.approx(2.2e-5, rel=0.02) and mm1_weight_decay(2e-5) == pytest.approx(2e-6)
    # Step Law grows with data and shrinks with size by its exponents.
    assert step_law_lr(2e9, 1e11) / step_law_lr(1e9, 1e11) == pytest.approx(2**-0.713)
    assert step_law_lr(1e9, 2e11) / step_law_lr(1e9, 1e11) == pytest.approx(2**0.307)
    assert step_law_batch(2e11) / step_law_batch(1e11) == pytest.approx(2**0.571)
