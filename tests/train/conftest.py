"""Shards and a maker of recipes, shared by the tests of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.schema import Recipe
from tests.data.inputs import tokenizer
from tests.train import tiny

Make = Callable[..., Recipe]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tiny shards of all four kinds."""
    folder = tmp_path_factory.mktemp("shards")
    tiny.write_shards(folder, tokenizer())
    return folder


@pytest.fixture(scope="session")
def make(shards: Path) -> Make:
    """make(out, **changes): a dense recipe on the shards."""

    def recipe(out: Path, **changes: Any) -> Recipe:
        return tiny.recipe(shards, out, tokenizer(), **changes)

    return recipe
