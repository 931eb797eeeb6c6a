"""A sweep file: which recipe, what varies, how long a trial is, how many there are.

name: lr
recipe: ../recipes/demo/3_instruct.yaml       # relative to this file
out: runs/sweeps/lr
sampler: tpe                                  # tpe | random | grid
trials: 40
set: [steps=200]                              # key=value for all trials
variants: {w32: [...], w64: [...]}            # one of these lists of key=value for each trial
search:                                       # recipe keys
  optim.lr: {low: 1.0e-3, high: 6.4e-2}       # log-uniform
  mup.init: {choices: [0.5, 1.0]}
"""

import math
import sys
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mmtrain.config.check import check
from mmtrain.config.errors import ConfigError
from mmtrain.config.keys import sections
from mmtrain.config.load import load
from mmtrain.config.schema import Recipe
from mmtrain.config.suggest import nearest

VARIANT = "variant"
"""Name of the parameter that says which of the sweep's variants a trial is."""

Sampler = Literal["tpe", "random", "grid"]
Value = float | int | str


@dataclass(frozen=True)
class Range:
    """Log-uniform between two positive numbers."""

    low: float
    high: float


@dataclass(frozen=True)
class Choices:
    """One of a few values."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Parent:
    """The stage before, trained once for each variant, whose weights every trial of the variant starts from."""

    recipe: Path
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """Length of a trial; one of both. Without any it is the recipe's own."""

    tokens: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Prune:
    """Median rule: a trial ends early when its best loss so far is above the median of its variant's at that step."""

    startup: int = 5
    """Finished trials of the variant before the rule applies."""
    warmup: float = 0.3
    """Share of the steps that every trial may run."""


@dataclass(frozen=True)
class Repeat:
    """The best points once more with other seeds."""

    best: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked."""

    file: Path
    name: str
    recipe: Path
    out: Path
    search: dict[str, Range | Choices]
    sampler: Sampler = "tpe"
    trials: int = 0
    seed: int = 0
    """Of the sampler: a study's points follow from it (TPE's also from the results that are there when it is asked)."""
    storage: Literal["journal", "sqlite"] = "journal"
    objective: str = "all"
    """Held-out source whose loss at the last step is minimised."""
    set: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})
    parent: Parent | None = None
    budget: Budget | None = None
    prune: Prune | None = None
    repeat: Repeat | None = None

    def points(self) -> list[dict[str, Value]]:
        """All points of a grid; the variant changes fastest, then the last key of `search`."""
        axes = [[(key, value) for value in space.values] for key, space in self.search.items()]
        return [dict(point) for point in product(*axes, [(VARIANT, name) for name in self.variants])]

    def recipe_of(self, params: dict[str, Value], out: Path, extra: tuple[str, ...] = ()) -> Recipe:
        """The recipe of a point. ConfigError: it is none."""
        chosen = [f"{key}={value}" for key, value in params.items() if key != VARIANT]
        return load(self.recipe, [*self.set, *self.variants[params[VARIANT]], *extra, *chosen, f"out={out}"])

    def parent_of(self, variant: str) -> Recipe | None:
        """The recipe of a variant's parent; None without one."""
        if self.parent is None:
            return None
        out = self.out / "parents" / (variant or "all")
        return load(self.parent.recipe, [*self.parent.set, *self.variants[variant], f"out={out}"])

    def corners(self) -> list[dict[str, Value]]:
        """Points that together hold every variant and every end of every range."""
        first = {
            key: space.values[0] if isinstance(space, Choices) else space.low for key, space in self.search.items()
        }
        ends = [
            {**first, key: value}
            for key, space in self.search.items()
            for value in (space.values if isinstance(space, Choices) else (space.low, space.high))
        ]
        names = list(self.variants)
        return [{VARIANT: names[0], **point} for point in ends] + [{VARIANT: name, **first} for name in names]


def read_sweep(file: Path) -> Sweep:
    """The sweep of a file. ConfigError lists every mistake: unknown keys, empty ranges, recipes that cannot be."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: holds no key: value lines; {__doc__.splitlines()[0]}")
    problems: list[str] = []
    sweep = _parse(file, raw, problems)
    if sweep is not None and not problems:
        problems += _impossible(sweep)
    if problems:
        raise ConfigError(f"sweep {file} cannot run:\n" + "\n".join(f"  {problem}" for problem in problems))
    return sweep


def _parse(file: Path, raw: dict[str, Any], problems: list[str]) -> Sweep | None:
    """The sweep without looking at recipes; what is wrong is added to `problems`."""
    known = [name.name for name in fields(Sweep) if name.name != "file"]
    problems += [f"{key}: unknown key{nearest(str(key), known)}" for key in raw if key not in known]
    problems += [f"{key}: no value" for key in ("name", "recipe", "out", "search") if not raw.get(key)]
    values: dict[str, Any] = {key: raw[key] for key in known if key in raw}
    for key, allowed in (("sampler", get_args(Sampler)), ("storage", ("journal", "sqlite"))):
        if values.get(key, allowed[0]) not in allowed:
            problems.append(f"{key}: {values[key]!r} is none of {', '.join(allowed)}")
    for key in ("name", "recipe", "out", "objective"):
        if not isinstance(values.get(key) or "", str):
            problems.append(f"{key}: {values[key]!r} is not text; write it in quotes")
    for key in ("trials", "seed"):
        if key in values:
            values[key] = _typed(key, int, values[key], problems)
    kinds = {"parent": Parent, "budget": Budget, "prune": Prune, "repeat": Repeat}
    for key, kind in kinds.items():
        if key in values:
            values[key] = _section(key, kind, values[key], problems)
    space = values.get("search") or {}
    if not isinstance(space, dict):
        problems.append(f"search: {space!r} is not a section of key: {{low: A, high: B}} or key: {{choices: [A, B]}}")
        space = {}
    if VARIANT in space:
        problems.append(f"search.{VARIANT}: no key of a recipe; list the variants under variants")
    values["search"] = {str(key): _space(f"search.{key}", given, problems) for key, given in space.items()}
    values["set"] = _overrides("set", values.get("set", []), problems)
    if "variants" in values:
        named = values["variants"] if isinstance(values["variants"], dict) else {}
        if not named:
            problems.append("variants: no name: [key=value, ...] in it")
        values["variants"] = {
            str(name): _overrides(f"variants.{name}", given, problems) for name, given in named.items()
        }
    if problems:
        return None
    if values.get("parent"):
        values["parent"] = Parent(_beside(file, values["parent"].recipe), values["parent"].set)
    return Sweep(**{**values, "file": file, "recipe": _beside(file, raw["recipe"]), "out": Path(raw["out"])})


def _section(where: str, kind: type, given: Any, problems: list[str]) -> Any:
    """A dataclass from a mapping of its fields."""
    known = sections(kind)
    if not isinstance(given, dict):
        problems.append(f"{where}: {given!r} is not a section with {', '.join(known)}")
        return None
    before = len(problems)
    problems += [f"{where}.{key}: unknown key{nearest(str(key), known)}" for key in given if key not in known]
    needed = [one.name for one in fields(kind) if one.default is MISSING]
    problems += [f"{where}.{key}: no value" for key in needed if key not in given]
    values = {
        key: _typed(f"{where}.{key}", known[key], value, problems) for key, value in given.items() if key in known
    }
    return kind(**values) if len(problems) == before else None


WANTED = {
    int: "a whole number of at least 0",
    float: "a number of at least 0",
    tuple[int, ...]: "a list of different whole numbers of at least 0",
    Path: "the name of a file",
}


def _typed(where: str, kind: Any, given: Any, problems: list[str]) -> Any:
    """`given` as a value of an annotated type of this file."""
    if kind == tuple[str, ...]:
        return _overrides(where, given, problems)
    if kind is Path and isinstance(given, str):
        return Path(given)
    if kind is int and type(given) is int and given >= 0:
        return given
    if kind is float and type(number := _number(given)) in (int, float) and 0 <= number < math.inf:
        return float(number)
    if kind == tuple[int, ...] and isinstance(given, list) and given:
        different = len(set(map(str, given))) == len(given)
        if different and all(type(item) is int and item >= 0 for item in given):
            return tuple(given)
    problems.append(f"{where}: {given!r} is not {WANTED[kind]}")
    return None


def _number(given: Any) -> Any:
    """A number written as text, as YAML reads 1e-3, as that number; anything else as it is."""
    try:
        number = float(given) if isinstance(given, str) and not given.isdecimal() else given
    except ValueError:
        return given
    return number if not isinstance(number, float) or math.isfinite(number) else given


def _space(where: str, given: Any, problems: list[str]) -> Range | Choices | None:
    """A range or choices."""
    if isinstance(given, dict) and given.keys() == {"choices"} and isinstance(given["choices"], list):
        values = [_number(value) for value in given["choices"]]
        if not values:
            problems.append(f"{where}: no choices")
        if any(not isinstance(value, int | float | str) for value in values):
            problems.append(f"{where}: {given['choices']} are not all numbers or text")
        if len(set(map(str, values))) < len(values):
            problems.append(f"{where}: {given['choices']} holds a choice twice")
        return Choices(tuple(values))
    if isinstance(given, dict) and given.keys() == {"low", "high"}:
        try:
            low, high = float(given["low"]), float(given["high"])
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 < low < high < math.inf:
            problems.append(f"{where}: low {given['low']} and high {given['high']} must be numbers with 0 < low < high")
        return Range(low, high)
    problems.append(f"{where}: {given!r} is neither {{low: A, high: B}} nor {{choices: [A, B]}}")
    return None


def _overrides(where: str, given: Any, problems: list[str]) -> tuple[str, ...]:
    """A list of key=value."""
    if isinstance(given, list) and all(isinstance(item, str) and "=" in item for item in given):
        return tuple(given)
    problems.append(f"{where}: {given!r} is not a list of key=value")
    return ()


def _beside(file: Path, name: Any) -> Path:
    """A file named by a sweep file."""
    return file.parent / str(name)


def _impossible(sweep: Sweep) -> list[str]:
    """What cannot be although every key is right: sizes, and points that are no recipes."""
    problems = []
    ranges = [key for key, space in sweep.search.items() if isinstance(space, Range)]
    if sweep.sampler == "grid" and ranges:
        problems.append(f"search: a grid has choices only, but {', '.join(ranges)} is a range; list its values")
    if sweep.sampler != "grid" and sweep.trials < 1:
        problems.append("trials: 0; say how many points to try (a grid has its own number)")
    if sweep.sampler == "tpe" and len(sweep.variants) > 1:
        problems.append(
            "sampler: tpe would search the best of the variants too, and leave the others few trials; "
            "take grid or random, or a sweep for each variant"
        )
    if sweep.budget and bool(sweep.budget.tokens) == bool(sweep.budget.flops):
        problems.append("budget: give tokens or flops, one of both")
    if sweep.repeat and "seed" in sweep.search:
        problems.append("repeat: seed is searched, so every point has its seeds; take one of both out")
    for point in [] if problems else sweep.corners():
        try:
            recipe = _checked(sweep, point)
        except ConfigError as error:
            problems.append(f"{_words(point)}: {error}")
            continue
        if sweep.repeat and recipe.seed in sweep.repeat.seeds:
            problems.append(f"repeat.seeds: {recipe.seed} is the first runs' own seed; repeat with others")
        if not recipe.eval.every or sweep.objective not in ("all", *recipe.eval.sources):
            measured = ", ".join(("all", *recipe.eval.sources)) if recipe.eval.every else "nothing (eval.every=0)"
            problems.append(f"objective: {sweep.objective}: the recipe measures {measured}")
            break
    return list(dict.fromkeys(problems))


def _checked(sweep: Sweep, point: dict[str, Value]) -> Recipe:
    """The recipe of a point. ConfigError: it, or its parent, cannot run."""
    parent = sweep.parent_of(point[VARIANT])
    if parent is not None:
        check(parent, 1)
    recipe = sweep.recipe_of(point, sweep.out, (f"init_from={parent.out}",) if parent else ())
    check(replace(recipe, steps=sys.maxsize, epochs=0.0) if sweep.budget else recipe, 1)
    return recipe


def _words(point: dict[str, Value]) -> str:
    return ", ".join(f"{key}={value}" for key, value in point.items() if value != "")
