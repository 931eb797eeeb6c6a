"""Which keys exist, and how an error points at the nearest one."""

import pytest

from mmtrain.config.keys import exists, hint, leaves
from tests.config.sample import RECIPE


@pytest.mark.parametrize(
    "key", ["optim", "optim.lr", "data.sources.any.weight", "optim.lr_multipliers.decoder.*", "upcycle.vision.noise"]
)
def test_keys_and_sections_of_the_schema_exist(key):
    assert exists(key)


@pytest.mark.parametrize("key", ["optm", "optim.lr.x", "data.sources.any.wait", "upcycle.vision.std", ""])
def test_other_keys_do_not_exist(key):
    assert not exists(key)


def test_every_leaf_is_a_key_of_the_schema():
    found = dict(leaves(RECIPE))
    assert len(found) > 100
    assert all(exists(key) for key in found)
    assert found["optim.lr_multipliers"] == {}


@pytest.mark.parametrize(
    ("word", "choices", "text"),
    [
        ("tensr", ["tensor", "expert"], " (did you mean tensor?)"),
        (7, (0, 1, 2, 3), " (the nearest is 3)"),
        ("qqq", ["a", "b"], " (known: a, b)"),
        ("qqq", [], ""),
    ],
)
def test_hint_points_at_the_nearest_or_lists_all(word, choices, text):
    assert hint(word, choices) == text
