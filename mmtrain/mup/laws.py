"""Published laws for what width does not transfer. Sanity lines beside a transferred value, never its source.

They were fitted on other models and contradict each other in their exponents; a value far from all of them deserves a
look, no more.
"""

import math


def step_law_lr(parameters: float, tokens: float) -> float:
    """Peak learning rate of a dense language model in SP: 1.79 N^-0.713 D^0.307 (Step Law, arXiv:2503.04715).

    parameters  N, without embeddings
    tokens      D, of the whole run
    """
    return 1.79 * parameters**-0.713 * tokens**0.307


def step_law_batch(tokens: float) -> float:
    """Tokens of an optimizer step: 0.58 D^0.571 (Step Law, arXiv:2503.04715)."""
    return 0.58 * tokens**0.571


def mm1_lr(parameters: float) -> float:
    """Peak learning rate of a multimodal model: exp(-0.4214 ln N - 0.5535) (MM1, arXiv:2403.09611, section 3.3)."""
    return math.exp(-0.4214 * math.log(parameters) - 0.5535)


def mm1_weight_decay(lr: float) -> float:
    """MM1's weight decay: 0.1 times the peak learning rate."""
    return 0.1 * lr
