"""A recipe without mistakes, and changes to it by dotted key."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from mmtrain.config.schema import Connector, Data, Decoder, Model, Recipe, Source, Vision

VISION = Vision(image_size=(32, 48), patch_size=8, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64)
CONNECTOR = Connector(kind="c_abstractor", num_tokens=4, hidden_size=32, depth=1, num_heads=4)
DECODER = Decoder(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
)
RECIPE = Recipe(
    name="sample",
    out="runs/sample",
    steps=10,
    model=Model(VISION, CONNECTOR, DECODER),
    data=Data(sources={"a": Source("data/a")}, tokenizer="data/tokenizer.json", sequence_length=64, global_batch=8),
)


def changed(section: Any, **values: Any) -> Any:
    """`section` with values replaced; a key is dotted with double underscores: changed(RECIPE, optim__lr=1.0)."""
    for key, value in values.items():
        name, _, rest = key.partition("__")
        assert is_dataclass(section) and name in {field.name for field in fields(section)}, name
        value = changed(getattr(section, name), **{rest: value}) if rest else value
        section = replace(section, **{name: value})
    return section
