"""What muP says of every parameter of a model, by name: made once from models on the meta device, before sharding.

Sharding changes shapes, wraps and replaces parameters; names and this table stay.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import PARTS, Mup
from mmtrain.config.suggest import nearest
from mmtrain.mup.roles import Role
from mmtrain.mup.rules import ratios, rule


@dataclass(frozen=True)
class Entry:
    """One parameter.

    part       vision, connector or decoder.
    shape      of the unsharded tensor.
    m_in, m_out  the role's fans over those of the base model.
    init_std   of a normal start; 0.0 for zeros and ones.
    lr_mult, wd_mult, eps_mult  factors on the recipe's lr (mup.lr of the part included), weight decay and epsilon.
    """

    part: str
    shape: tuple[int, ...]
    role: Role
    base_fan_in: int | None
    base_fan_out: int
    m_in: float
    m_out: float
    init_std: float
    lr_mult: float
    wd_mult: float
    eps_mult: float


@dataclass(frozen=True)
class Registry:
    """Entries by the model's parameter names, in the model's order. A tied weight is there once, by its first name."""

    entries: Mapping[str, Entry]

    @classmethod
    def build(cls, model: nn.Module, base: nn.Module, mup: Mup) -> "Registry":
        """The table of `model` against `base`, the same model at the base widths. Both may be on the meta device.

        Raises ValueError when a parameter has no role or another kind in the base; ConfigError when the base widths
        give a model with other parameters, or mup.lr names something that is no part.
        """
        for part in mup.lr:
            if part not in PARTS:
                raise ConfigError(f"mup.lr.{part}: the parts are {', '.join(PARTS)}{nearest(part, PARTS)}")
        roles, base_roles = _roles(model), _roles(base)
        if roles.keys() != base_roles.keys():
            raise ConfigError(
                "mup.base: the model at the base widths has other parameters: "
                f"only the model has {sorted(roles.keys() - base_roles.keys())}, "
                f"only the base has {sorted(base_roles.keys() - roles.keys())}; take base widths in the model's "
                "proportions (a C-Abstractor has a shortcut weight only where vision and connector differ in width)"
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return cls({name: _entry(name, shapes[name], role, base_roles[name], mup) for name, role in roles.items()})

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def hash(self) -> str:
        """sha256 over names, shapes, roles and base widths: what must not change between a checkpoint and its resume.

        The recipe's multipliers are not part of it: they are recipe keys and are compared as such.
        """
        rows = [
            [name, entry.shape, asdict(entry.role), entry.base_fan_in, entry.base_fan_out]
            for name, entry in sorted(self.entries.items())
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_expert(name: str) -> bool:
    """Whether parameter `name` holds experts: one slice a (global) expert along dimension 0."""
    return ".experts." in name


def _roles(model: nn.Module) -> dict[str, Role]:
    """Each parameter's declared role; ValueError names those without one."""
    roles = {name: getattr(parameter, "role", None) for name, parameter in model.named_parameters()}
    missing = [name for name, role in roles.items() if role is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(roles)} parameters have no role, so muP has no rule for them: "
            f"{', '.join(missing[:5])}; declare each one beside its definition (mmtrain.mup.roles.declare)"
        )
    return roles


def _entry(name: str, shape: tuple[int, ...], role: Role, base: Role, mup: Mup) -> Entry:
    part = name.split(".", 1)[0]
    if part not in PARTS:
        raise ValueError(f"parameter {name} belongs to no part: names begin with {', '.join(PARTS)}")
    if (role.kind, role.init) != (base.kind, base.init):
        raise ValueError(f"parameter {name} is {role} in the model but {base} in its base; only fans may differ")
    m_in, m_out = ratios(role, base)
    found = rule(role, base, len(shape), mup)
    return Entry(
        part=part,
        shape=shape,
        role=role,
        base_fan_in=base.fan_in,
        base_fan_out=base.fan_out,
        m_in=m_in,
        m_out=m_out,
        init_std=found.init_std,
        lr_mult=found.lr * mup.lr.get(part, 1.0),
        wd_mult=found.weight_decay,
        eps_mult=found.eps,
    )
