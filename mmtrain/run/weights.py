"""Does a checkpoint belong to this model, and what does `init_from` take from it?"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mmtrain.config.errors import CheckpointError
from mmtrain.run.manifest import shortened
from mmtrain.run.reader import Reader

Shapes = Mapping[str, Sequence[int]]


def check_same_model(reader: Reader, shapes: Shapes, registry_hash: str) -> None:
    """CheckpointError listing every difference when `reader` is no checkpoint of the model with these parameters."""
    saved = reader.shapes()
    problems = []
    if missing := sorted(shapes.keys() - saved.keys()):
        problems.append(f"{len(missing)} tensors of the model are not in it: {shortened(missing)}")
    if unknown := sorted(saved.keys() - shapes.keys()):
        problems.append(f"{len(unknown)} of its tensors are not in the model: {shortened(unknown)}")
    differing = [name for name in sorted(shapes.keys() & saved.keys()) if tuple(shapes[name]) != saved[name]]
    if differing:
        texts = [f"{name} is {list(saved[name])}, the model's is {list(shapes[name])}" for name in differing]
        problems.append(f"{len(differing)} shapes differ: {shortened(texts)}")
    if not problems and reader.manifest.state.registry_hash != registry_hash:
        problems.append(
            f"names and shapes agree, but its muP roles or base widths do not (registry {_short(reader)} against "
            f"{registry_hash[:12]}): learning rates would change"
        )
    if problems:
        raise CheckpointError(
            f"{reader.folder} is a checkpoint of another model: {'; '.join(problems)}. "
            "Use its own recipe, another out, or name it in init_from to take the weights that fit."
        )


def _short(reader: Reader) -> str:
    return reader.manifest.state.registry_hash[:12]


@dataclass
class WeightPlan:
    """Where each tensor of the model comes from. Target name -> source name, except `fresh` and `unused`."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Taken as they are."""
    upcycled: dict[str, str] = field(default_factory=dict)
    """Experts, each made of one dense tensor: a copy or a slice."""
    interpolated: dict[str, str] = field(default_factory=dict)
    """Positions of another grid."""
    fresh: list[str] = field(default_factory=list)
    """Not in the source: initialised by the muP rules."""
    unused: list[str] = field(default_factory=list)
    """In the source, wanted by nothing."""

    def report(self, target: Shapes, source: Shapes) -> str:
        """Lines for the log: per kind the number of tensors and values, then name patterns with their counts."""
        sections = [
            section("loaded", {name: target[name] for name in self.loaded}).splitlines()[0],  # the rest is of interest
            section("upcycled", {name: target[name] for name in self.upcycled}),
            section("interpolated", {name: target[name] for name in self.interpolated}),
            section("fresh", {name: target[name] for name in self.fresh}),
            section("unused", {name: source[name] for name in self.unused}),
        ]
        return "\n".join(sections)


def section(title: str, shapes: Shapes) -> str:
    """A title with the number of tensors and values, and a line for each name pattern with its count."""
    values = sum(math.prod(shape) for shape in shapes.values())
    patterns = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in shapes)
    counted = [f"{'':>14}{pattern}" + (f"  x{count}" if count > 1 else "") for pattern, count in patterns.items()]
    return "\n".join([f"{title:>12}: {len(shapes):4d} tensors, {values:,} values", *counted])


def plan_weights(
    target: Shapes,
    source: Shapes,
    origins: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    resized: Collection[str] = ("vision.positions",),
    label: str = "init_from",
) -> WeightPlan:
    """Decide where every tensor of `target` (name -> global shape) comes from.

    origins   target name -> source name and the shape that it must have there, where tensors are made of others
              (model.upcycle's map); any other name stands for itself
    resized   names whose first dimension may differ, because they are interpolated
    label     what errors call the source

    CheckpointError: nothing at all fits (a wrong path, or names of another library), or a shape differs in another way.
    """
    origins = origins or {}
    plan = WeightPlan()
    wrong = []
    for name, shape in target.items():
        origin, wanted = origins.get(name, (name, tuple(shape)))
        if origin not in source:
            plan.fresh.append(name)
            continue
        given = tuple(source[origin])
        if wanted == given:
            (plan.upcycled if name in origins else plan.loaded)[name] = origin
        elif name in resized and wanted[1:] == given[1:]:
            plan.interpolated[name] = origin
        elif name in origins:
            wrong.append(f"{name} is made of {list(wanted)}, {origin} in the checkpoint is {list(given)}")
        else:
            wrong.append(f"{name} is {list(wanted)}, {origin} in the checkpoint is {list(given)}")
    if wrong:
        raise CheckpointError(
            f"{label}: {len(wrong)} shapes do not fit: {shortened(wrong)}. "
            "Set the model's sizes to the checkpoint's, or name a checkpoint of this model."
        )
    used = {*plan.loaded.values(), *plan.upcycled.values(), *plan.interpolated.values()}
    plan.unused = [name for name in source if name not in used]
    if not used:
        raise CheckpointError(
            f"{label}: none of the checkpoint's {len(source)} tensors ({shortened(list(source), 2)}) is one of the "
            f"model's {len(target)} ({shortened(list(target), 2)}). Is it the right checkpoint?"
        )
    return plan
