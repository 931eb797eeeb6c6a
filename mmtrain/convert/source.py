"""Pretrained Hugging Face weights under our names, one tensor at a time: what `model.<part>.pretrained` reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmtrain.config.errors import CheckpointError
from mmtrain.config.pretrained import OWN, Described, describe, read_config
from mmtrain.config.schema import PARTS, Decoder, Model, Vision
from mmtrain.convert.files import TYPES, Folder
from mmtrain.convert.names import (
    LEFT_OUT,
    OTHER_PARTS,
    SEPARATOR,
    Origin,
    Table,
    connector_table,
    decoder_table,
    prefix_of,
    vision_table,
)
from mmtrain.parallel.box import Box
from mmtrain.run.manifest import shortened

VOCABULARY = ("decoder.embedding.weight", "decoder.head.weight")


class Pretrained:
    """The parts of a recipe's model that name a pretrained folder, as one set of tensors."""

    def __init__(self, model: Model) -> None:
        """ConfigError, CheckpointError: a folder, its config.json or its files cannot be used."""
        self._rows = model.decoder.vocab_size
        self._origins: dict[str, tuple[Folder, Origin]] = {}
        self.vision: Vision | None = None
        """The tower as it was pretrained."""
        self.unread: dict[str, tuple[int, ...]] = {}
        """Shape of each tensor of its parts that no model here reads, by its name in the files."""
        folders: dict[str, Folder] = {}
        for part in PARTS:
            if path := getattr(model, part).pretrained:
                folder = folders.setdefault(path, Folder(Path(path)))
                for name, origin in self._table(part, folder, getattr(model, part)).items():
                    self._origins[name] = (folder, origin)
        self.parts = tuple(part for part in PARTS if getattr(model, part).pretrained)
        """Parts that it starts."""
        self.label = ", ".join(folders)
        """The folders, in words."""

    def _table(self, part: str, folder: Folder, config: Any) -> Table:
        """The part's tensors, checked by name against the files. `config` is the recipe's."""
        found = describe(folder.path, part)
        if found.family == OWN:
            return self._own_table(part, folder, found)
        prefix = prefix_of(part, folder.shapes)
        if prefix is None:
            raise CheckpointError(
                f"{folder.path}: none of its {len(folder.shapes)} tensors ({shortened(list(folder.shapes), 2)}) is a "
                f"{found.family}'s; its config.json belongs to other weights"
            )
        if part == "vision":
            self.vision = _with(Vision(), found.fixed | found.free)
            shown = replace(self.vision, final_norm=config.final_norm)
            table = vision_table(shown, self.vision.num_layers, prefix)
        elif part == "connector":
            table = connector_table(prefix)
        else:
            decoder = _with(Decoder(), found.fixed | found.free)
            table = decoder_table(decoder, found.family, prefix, _head(prefix, folder))
        unread = _compare(part, prefix, table, folder, read_config(folder.path)["model_type"])
        self.unread |= {name: folder.shapes[name] for name in unread}
        return table

    def _own_table(self, part: str, folder: Folder, found: Described) -> Table:
        """The part's tensors in a folder that mmtrain wrote: they have our names."""
        if part == "vision":
            self.vision = _with(Vision(), found.fixed | found.free)
        names = [name for name in folder.shapes if name.startswith(f"{part}.")]
        biases = [name for name in names if name.endswith(".router.bias")]
        if learnt := [name for name in biases if folder.read(name).any()]:
            raise CheckpointError(
                f"{folder.path}: {len(learnt)} routers have learnt biases ({shortened(learnt)}), which a pretrained "
                "part cannot bring; give the model's own checkpoint as init_from"
            )
        return {name: Origin((name,)) for name in names if name not in biases}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, under our names; the vocabulary is the recipe's, which may be larger."""
        return {name: self._shape(name) for name in self._origins}

    def _shape(self, name: str) -> tuple[int, ...]:
        folder, origin = self._origins[name]
        shape = folder.shapes[origin.names[0]]
        if origin.experts:
            return (len(origin.names), *shape)
        if name in VOCABULARY:
            return (max(self._rows, shape[0]), *shape[1:])
        return (1, *shape) if origin.row else shape

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """A tensor, or a box of it, in the type of the files; holds that tensor whole meanwhile, or one expert of it.

        Rows that the recipe's vocabulary has beyond the checkpoint's are the mean of the checkpoint's rows.
        """
        folder, origin = self._origins[name]
        box = box or Box.whole(self._shape(name))
        if origin.experts:
            numbers = range(box.start[0], box.stop[0])
            return torch.stack([folder.read(origin.names[number])[box.slices()[1:]] for number in numbers])
        value = folder.read(origin.names[0])
        if origin.row:
            value = value.unsqueeze(0)
        if name in VOCABULARY and box.stop[0] > value.shape[0]:
            return _grown(value, box)
        return value[box.slices()]


def _grown(rows: torch.Tensor, box: Box) -> torch.Tensor:
    """`box` of `rows` [V, d] followed by as many copies of their mean as it takes."""
    known = box.clip(tuple(rows.shape))
    mean = rows.mean(0, dtype=torch.float64).to(rows.dtype)[box.slices()[1]]
    more = box.stop[0] - max(box.start[0], rows.shape[0])
    return torch.cat((rows[known.slices()], mean.expand(more, -1)))


def _with(config: Any, values: dict[str, Any]) -> Any:
    """A schema section with dotted keys replaced."""
    nested: dict[str, dict[str, Any]] = {}
    plain = {}
    for key, value in values.items():
        section, _, rest = key.partition(".")
        if rest:
            nested.setdefault(section, {})[rest] = value
        else:
            plain[key] = value
    inner = {section: _with(getattr(config, section), found) for section, found in nested.items()}
    return replace(config, **plain, **inner)


def _head(prefix: str, folder: Folder) -> str:
    """What the language head's name begins with."""
    heads = [name.removesuffix("weight") for name in folder.shapes if name.endswith("lm_head.weight")]
    return heads[0] if heads else prefix.removesuffix("model.") + "lm_head."


def _compare(part: str, prefix: str, table: Table, folder: Folder, kind: str) -> list[str]:
    """The names that are known to be read by no model of ours.

    CheckpointError by name unless each tensor of the part is in the files as plain weights, and each tensor of the
    files in the part, in another part, or one of these.
    """
    wanted = {name for origin in table.values() for name in origin.names}
    if missing := sorted(wanted - folder.shapes.keys()):
        raise CheckpointError(
            f"{folder.path}: {len(missing)} tensors that its config.json asks for are not in its files: "
            f"{shortened(missing)}. Get the files anew, or the config.json that belongs to them."
        )
    if strange := sorted(wanted & folder.strange.keys()):
        raise CheckpointError(
            f"{folder.path}: {len(strange)} tensors are of a type that holds no plain weights ({strange[0]} is "
            f"{folder.strange[strange[0]]}; {', '.join(TYPES)} do). Take the checkpoint before quantisation."
        )
    left_out = LEFT_OUT[part]
    unread = [
        name
        for name in folder.shapes
        if name not in wanted
        and (SEPARATOR.fullmatch(name) or (name.startswith(prefix) and left_out.fullmatch(name.removeprefix(prefix))))
    ]
    others = [
        name
        for name in sorted(folder.shapes.keys() - wanted - set(unread))
        if not (kind in OTHER_PARTS and OTHER_PARTS[kind].match(name) and not name.startswith(prefix))
    ]
    if others:
        raise CheckpointError(
            f"{folder.path}: {len(others)} of its tensors are none that mmtrain knows: {shortened(others)}. They would "
            "be lost; this architecture cannot be held."
        )
    return unread
