"""The table against its closed form, and against itself with every rule broken once."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.config.schema import Mup
from mmtrain.mup import registry as registry_module
from mmtrain.mup.registry import Registry
from mmtrain.mup.roles import Role
from mmtrain.mup.rules import Rule, ratios, rule
from tests.mup.toy import Widths, closed_form, toy

BASE = Widths()
GROWN = Widths(vision=64, experts=4, expert_ffn=48, connector=24, decoder=160, kv=8, ffn=120)
MORE_EXPERTS = replace(GROWN, experts=16, kv=16)


def check(widths: Widths, base: Widths = BASE, mup: Mup = Mup()) -> None:  # noqa: B008
    """Assert that the registry says of every weight what the closed form says."""
    registry = Registry.build(toy(widths), toy(base), mup)
    expected = closed_form(widths, base)
    assert registry.entries.keys() == expected.keys()
    for name, numbers in expected.items():
        entry = registry[name]
        found = (entry.init_std, entry.lr_mult, entry.wd_mult, entry.eps_mult)
        assert found == pytest.approx(numbers, rel=1e-12), name


multiples = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(Widths, multiples, multiples, multiples, multiples, multiples, multiples, multiples),
    st.builds(Widths, multiples, multiples, multiples, multiples, multiples, multiples, multiples),
)
def test_random_widths_follow_the_closed_form(widths, base):
    check(widths, base)


@pytest.mark.parametrize("widths", [BASE, GROWN, MORE_EXPERTS])
def test_each_kind_of_growth_follows_the_closed_form(widths):
    check(widths)


def test_at_the_base_every_factor_is_one():
    for name, entry in Registry.build(toy(BASE), toy(BASE), Mup()).entries.items():
        assert (entry.m_in, entry.m_out, entry.lr_mult, entry.eps_mult) == (1.0, 1.0, 1.0, 1.0), name
        vector = entry.role.kind == "vector" or len(entry.shape) == 1
        assert entry.wd_mult == (0.0 if vector else 1.0), name
        if entry.role.init == "normal":
            assert entry.init_std == (entry.role.std or entry.role.fan_in**-0.5), name


def faulty(name: str, role: Role, base: Role, right: Rule) -> Rule:
    """The table's row with the fault `name` in it; other weights keep the right row."""
    m_in, m_out = ratios(role, base)
    s = right.init_std
    hidden = role.kind == "matrix" and m_in != 1 and m_out != 1
    faults = {
        "hidden lr flat": (hidden, right._replace(lr=1.0)),
        "hidden lr by fan-out": (hidden, right._replace(lr=1 / m_out)),
        "hidden std flat": (hidden, right._replace(init_std=s * m_in**0.5)),
        "hidden std like an output": (hidden, right._replace(init_std=s * m_in**-0.5)),
        "hidden decay flat": (hidden, right._replace(weight_decay=1.0)),
        "hidden eps flat": (hidden, right._replace(eps=1.0)),
        "hidden eps by fan-in": (hidden, right._replace(eps=1 / m_in)),
        "input lr scaled": (role.kind == "input", right._replace(lr=1 / m_out)),
        "input std scaled": (role.kind == "input", right._replace(init_std=s * m_out**-0.5)),
        "input eps flat": (role.kind == "input", right._replace(eps=1.0)),
        "one-dimensional input decays": (role.kind == "input", right._replace(weight_decay=1.0)),
        "vector decays": (role.kind == "vector", right._replace(weight_decay=1.0)),
        "vector eps flat": (role.kind == "vector", right._replace(eps=1.0)),
        "head lr scaled": (role.kind == "head", right._replace(lr=1 / m_in)),
        "head std scaled": (role.kind == "head", right._replace(init_std=s / m_in)),
        "head eps flat": (role.kind == "head", right._replace(eps=1.0)),
        "router hidden-like": (role.kind == "router" and m_out == 1, right._replace(init_std=s * m_in**0.5)),
        "router lr flat": (role.kind == "router", right._replace(lr=1.0)),
        "router eps scaled": (role.kind == "router", right._replace(eps=1 / m_in)),
        "growing router output-like": (
            role.kind == "router" and m_out != 1,
            right._replace(init_std=s * m_in**-0.5),
        ),
        "fixed width output-like": (
            role.kind == "matrix" and m_out == 1 and m_in != 1,
            right._replace(init_std=s * m_in**-0.5),
        ),
        "fixed width eps scaled": (role.kind == "matrix" and m_out == 1, right._replace(eps=1 / m_in)),
        "out of a fixed width eps flat": (role.kind == "matrix" and m_in == 1, right._replace(eps=1.0)),
    }
    applies, row = faults[name]
    return row if applies else right


FAULTS = {
    "hidden lr flat": GROWN,
    "hidden lr by fan-out": GROWN,
    "hidden std flat": GROWN,
    "hidden std like an output": GROWN,
    "hidden decay flat": GROWN,
    "hidden eps flat": GROWN,
    "hidden eps by fan-in": GROWN,
    "input lr scaled": GROWN,
    "input std scaled": GROWN,
    "input eps flat": GROWN,
    "one-dimensional input decays": GROWN,
    "vector decays": GROWN,
    "vector eps flat": GROWN,
    "head lr scaled": GROWN,
    "head std scaled": GROWN,
    "head eps flat": GROWN,
    "router hidden-like": GROWN,
    "router lr flat": GROWN,
    "router eps scaled": GROWN,
    "growing router output-like": MORE_EXPERTS,
    "fixed width output-like": GROWN,
    "fixed width eps scaled": GROWN,
    "out of a fixed width eps flat": GROWN,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_seen(fault, monkeypatch):
    monkeypatch.setattr(
        registry_module, "rule", lambda role, base, dims, mup: faulty(fault, role, base, rule(role, base, dims, mup))
    )
    with pytest.raises(AssertionError):
        check(FAULTS[fault])


def test_multipliers_scale_what_they_name():
    plain = Registry.build(toy(GROWN), toy(BASE), Mup())
    tuned = Registry.build(toy(GROWN), toy(BASE), Mup(init=3.0, router=0.5, lr={"connector": 7.0}))
    factor = {"matrix": 3.0, "router": 0.5}
    for name, entry in plain.entries.items():
        assert tuned[name].init_std == pytest.approx(entry.init_std * factor.get(entry.role.kind, 1.0)), name
        assert tuned[name].lr_mult == entry.lr_mult * (7.0 if name.startswith("connector.") else 1.0), name
        assert (tuned[name].wd_mult, tuned[name].eps_mult) == (entry.wd_mult, entry.eps_mult), name


def test_a_normal_start_needs_a_std_or_a_fan_in():
    role = Role("input", None, 8)
    with pytest.raises(ValueError, match=r"starts from a normal draw, so it needs a std or a fan_in"):
        rule(role, role, 2, Mup())
