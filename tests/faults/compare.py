"""What a disturbed run owes to an undisturbed one."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mmtrain.config.schema import Recipe
from mmtrain.run.retain import committed
from tests.train.tiny import curve, last, tensors

KINDS = ("param", "exp_avg", "exp_avg_sq")


def difference(run: Recipe, other: Recipe, left_out: Collection[int] = ()) -> str:
    """The first thing that is not equal to the bit in two finished runs; empty when there is none.

    left_out   steps that changed nothing in the end, in both, but with other numbers and for other reasons
    """
    here, there = _lines(run, left_out), _lines(other, left_out)
    if [line["step"] for line in here] != [line["step"] for line in there]:
        return f"steps {[line['step'] for line in here]} and {[line['step'] for line in there]}"
    for mine, theirs in zip(here, there, strict=True):
        for key in mine.keys() | theirs.keys():
            if mine.get(key) != theirs.get(key):
                return f"step {mine['step']}: {key} {mine.get(key)} and {theirs.get(key)}"
    if leftovers := [path.name for path in Path(run.out).glob("*.tmp")]:
        return f"{leftovers} left behind"
    return _end(run, other, left_out)


def _lines(run: Recipe, left_out: Collection[int]) -> list[dict[str, Any]]:
    """The curve, without numbers of the steps that were left out."""
    return [{"step": line["step"]} if line["step"] in left_out else line for line in curve(run)]


def _end(run: Recipe, other: Recipe, left_out: Collection[int]) -> str:
    """The same of the last checkpoints."""
    one, two = last(run), last(other)
    if list(committed(Path(run.out)))[-1] != list(committed(Path(other.out)))[-1]:
        return "the last steps of the checkpoints"
    for field in ("cursor", "routers", "guard", "optimizer_steps", "metrics"):
        mine, theirs = (dict(state) if isinstance(state, dict) else state for state in _pair(one, two, field))
        if field == "guard" and left_out:
            mine, theirs = ({**state, "skips": 0, "rollbacks": 0} for state in (mine, theirs))
        if mine != theirs:
            return f"{field} in the last checkpoint: {mine} and {theirs}"
    mine, theirs = tensors(one, KINDS), tensors(two, KINDS)
    if mine.keys() != theirs.keys():
        return "the names of tensors in the last checkpoint"
    return next((" ".join(key) for key in mine if not torch.equal(mine[key], theirs[key])), "")


def _pair(one: Any, two: Any, field: str) -> tuple[Any, Any]:
    return getattr(one.manifest.state, field), getattr(two.manifest.state, field)
