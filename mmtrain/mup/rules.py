"""The muP table: initial std, learning rate, weight decay and Adam's epsilon of a weight.

Tensor Programs V (arXiv:2203.03466), Adam: table 3 for hidden weights, table 8 (forward multiplier) for the head, so
that tied embeddings work; epsilon follows the gradient's scale; weight decay keeps lr * decay constant.
m_in and m_out are the weight's own fans over those of the base model. At m_in = m_out = 1 every factor is 1.

| weight                                 | init std        | lr     | decay           | eps     |
| input                                  | s               | 1      | 1, 0 when 1-D   | 1/m_out |
| vector                                 | as declared     | 1      | 0               | 1/m_out |
| matrix, both fans grow                 | s * m_in**-0.5  | 1/m_in | m_in            | 1/m_out |
| matrix into a fixed width (m_out = 1)  | s * m_in**-0.5  | 1/m_in | m_in            | 1       |
| matrix out of a fixed width (m_in = 1) | s               | 1      | 1               | 1/m_out |
| head (forward 1/m_in, mup.scales)      | s               | 1      | 1               | 1/m_in  |
| router, fixed number of experts        | s / m_in        | 1/m_in | m_in            | 1       |
| router, experts grow                   | s * m_in**-0.5  | 1/m_in | m_in            | 1/m_out |
"""

from typing import NamedTuple

from mmtrain.config.schema import Mup
from mmtrain.mup.roles import Role


class Rule(NamedTuple):
    """What muP says of one weight.

    init_std is absolute (0.0 where the weight starts as zeros or ones); lr, weight_decay and eps are factors on the
    recipe's values, which are those of the base width.
    """

    init_std: float
    lr: float
    weight_decay: float
    eps: float


def ratios(role: Role, base: Role) -> tuple[float, float]:
    """(m_in, m_out): the fans of `role` over those of the same weight in the base model; 1 where there is no fan-in."""
    m_in = 1.0 if role.fan_in is None or base.fan_in is None else role.fan_in / base.fan_in
    return m_in, role.fan_out / base.fan_out


def rule(role: Role, base: Role, dimensions: int, mup: Mup) -> Rule:
    """The row of the table for a weight with `role`, whose counterpart in the base model has `base`.

    dimensions  number of dimensions of the weight's tensor: what is 1-D never decays.
    """
    m_in, m_out = ratios(role, base)
    std = _base_std(role, base, mup)
    decays = 0.0 if dimensions < 2 else 1.0
    match role.kind:
        case "input":
            return Rule(std, 1.0, decays, 1.0 / m_out)
        case "vector":
            return Rule(std, 1.0, 0.0, 1.0 / m_out)
        case "head":
            return Rule(std, 1.0, decays, 1.0 / m_in)
        case "matrix" | "router":
            # Logits of a fixed number of experts are output-like: they need 1/m_in already at the start (table 3). A
            # router whose experts grow is an ordinary hidden matrix. So is a projection into a fixed width, such as
            # keys and values of a fixed number of heads, although table 3 would call it an output: with 1/m_in their
            # attention fades with width (measured by tools.coord_check --grow heads; GQA-muP says the same).
            output_like = role.kind == "router" and m_out == 1.0
            return Rule(std / m_in if output_like else std * m_in**-0.5, 1.0 / m_in, decays * m_in, 1.0 / m_out)


def _base_std(role: Role, base: Role, mup: Mup) -> float:
    """The initial std at the base width, with the recipe's multipliers; 0.0 for zeros and ones."""
    if role.init != "normal":
        return 0.0
    if base.std is None and base.fan_in is None:
        raise ValueError(f"{role} starts from a normal draw, so it needs a std or a fan_in")
    std = base.fan_in**-0.5 if base.std is None else base.std
    return std * {"matrix": mup.init, "router": mup.router}.get(role.kind, 1.0)
