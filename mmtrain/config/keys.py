"""Dotted keys of a recipe: which exist, what they hold, and the words of an error about them. Standard library only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Recipe
from mmtrain.config.suggest import nearest


@cache
def sections(kind: type) -> dict[str, Any]:
    """Field name -> annotated type of a schema dataclass."""
    return get_type_hints(kind)


def bare(kind: Any) -> Any:
    """The X of an annotation `X | None`; any other annotation as it is."""
    some = [part for part in get_args(kind) if part is not NoneType]
    return some[0] if NoneType in get_args(kind) else kind


def is_section(kind: Any) -> bool:
    """Whether a value of this annotated type holds further keys."""
    return is_dataclass(bare(kind)) or get_origin(bare(kind)) is dict


def child(kind: Any, key: str) -> Any:
    """Annotated type of `key` inside a section of type `kind`; None when the schema has no such key."""
    kind = bare(kind)
    return sections(kind).get(key) if is_dataclass(kind) else get_args(kind)[1]


def exists(key: str) -> bool:
    """Whether a dotted key has a place in a recipe; below a mapping any name has."""
    kind: Any = Recipe
    for name in key.split("."):
        if not is_section(kind):
            return False
        kind = child(kind, name)
        if kind is None:
            return False
        if get_origin(kind) is dict and not is_section(get_args(kind)[1]):
            return True  # names of such a mapping may hold dots: optim.lr_multipliers
    return True


def wanted(kind: Any) -> str:
    """What a value of this annotated type looks like, in words for an error."""
    kind = bare(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(kind))
    if is_dataclass(kind):
        return "a section with keys of " + ", ".join(sections(kind))
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return "a mapping of names to " + ("sections" if is_section(inner) else wanted(inner))
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} values, each {wanted(get_args(kind)[0])}"
    if get_origin(kind) is list:
        return f"a list of values, each {wanted(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a dataclass or dict; an empty dict and a None are values themselves."""
    if is_dataclass(section):
        items: Iterable[tuple[str, Any]] = [(field.name, getattr(section, field.name)) for field in fields(section)]
    else:
        items = section.items()
    for name, value in items:
        key = f"{prefix}{name}"
        if is_dataclass(value) or (isinstance(value, Mapping) and value):
            yield from leaves(value, key + ".")
        else:
            yield key, value


def hint(word: object, choices: Iterable[object]) -> str:
    """End of an error about `word`: the choice that it resembles or is nearest to, or else the choices there are."""
    known = list(choices)
    if alike := nearest(str(word), map(str, known)):
        return alike
    if isinstance(word, int) and known and all(isinstance(choice, int) for choice in known):
        return f" (the nearest is {min(known, key=lambda choice: abs(choice - word))})"
    return f" (known: {', '.join(map(str, known))})" if known else ""


def together(heading: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems: a list under the heading, one line each."""
    return ConfigError(f"{heading}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))
