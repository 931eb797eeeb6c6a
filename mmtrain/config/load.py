"""Recipe files and key=value overrides -> one frozen Recipe. The only module that knows omegaconf.

A file may name one or more others under `base:`, relative to itself; they apply in that order, then the file, then the
command line. Mappings merge, but an empty one ({}) empties what was inherited; lists replace. A file that is inherited
along two ways applies once, at its first place.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from mmtrain.config.errors import ConfigError
from mmtrain.config.keys import bare, child, hint, is_section, leaves, sections, together, wanted
from mmtrain.config.pretrained import CONFIG, describe
from mmtrain.config.refused import refusal
from mmtrain.config.schema import PARTS, Recipe

COMMAND_LINE = "command line"
DEFAULT = "default"


class Layer(NamedTuple):
    """Values of one file or one override, and where they come from in words."""

    origin: str
    values: dict[Any, Any]


class Leaf(NamedTuple):
    """One value of a layer: its key, what the layer says, and the schema's type there."""

    path: tuple[str, ...]
    value: Any
    kind: Any


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `path` with `overrides` (key=value) on top. Raises one ConfigError that lists every mistake."""
    return load_with_origins(path, overrides)[0]


def load_with_origins(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, str]]:
    """The recipe, and for each dotted key that a layer set, the file or 'command line' that set it last."""
    problems: list[str] = []
    layers = list(_files(Path(path), (), set(), problems))
    whole = not problems  # with a file missing, every value that it would give seems to be missing too
    layers += _command_line(without_launcher_flags(overrides), problems)
    config = OmegaConf.structured(Recipe)
    origins: dict[str, str] = {}
    for layer in layers:
        config = _apply(config, layer, origins, problems)
    for part in PARTS:
        config = _from_pretrained(config, part, origins, problems)
    if whole:
        told = "\n".join(problems)
        for key in sorted(OmegaConf.missing_keys(config)):
            if f" {key}: " not in told:
                problems.append(f"{_shown(Path(path))}: {key}: no value; the recipe or {key}=... must give one")
    if problems:
        raise ConfigError(problems[0]) if len(problems) == 1 else together(f"recipe {_shown(Path(path))}", problems)
    return OmegaConf.to_object(config), origins


def dump(recipe: Recipe) -> str:
    """The whole recipe as YAML text. Loading that text gives an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def show(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """One line for each value: key, value, and the file (or 'command line', or 'default') that it comes from."""
    rows = [(key, _plain(value), _origin(key, origins)) for key, value in leaves(recipe)]
    widths = [min(48, max(len(row[column]) for row in rows)) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for key, value, origin in rows)


def without_launcher_flags(arguments: Sequence[str]) -> list[str]:
    """`arguments` without what launchers inject: --local_rank[=N], --deepspeed, --deepspeed_config FILE."""
    kept: list[str] = []
    skip_value = False
    for argument in arguments:
        if re.match(r"--(local[_-]rank|deepspeed)", argument):
            skip_value = "=" not in argument and argument != "--deepspeed"
        elif not (skip_value and not argument.startswith("-") and "=" not in argument):
            kept.append(argument)
            skip_value = False
        else:
            skip_value = False
    return kept


def _files(path: Path, below: tuple[Path, ...], seen: set[Path], problems: list[str]) -> Iterator[Layer]:
    """`path` and all that it inherits, the most basic first; `below` are the files that led here."""
    path = path.resolve()
    if path in below:
        problems.append("inherits from itself: " + " -> ".join(_shown(step) for step in (*below, path)))
        return
    if path in seen:
        return
    seen.add(path)
    values = _read(path, below, problems)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        problems.append(f"{_shown(path)}: base: {bases!r} is not a file name or a list of file names")
        bases = []
    for base in bases:
        yield from _files(path.parent / base, (*below, path), seen, problems)
    yield Layer(_shown(path), values)


def _read(path: Path, below: tuple[Path, ...], problems: list[str]) -> dict[Any, Any]:
    """Values of one file as plain containers; {} and a problem when it cannot be read."""
    by = f" (base of {_shown(below[-1])})" if below else ""
    try:
        own = OmegaConf.load(path)
    except FileNotFoundError:
        there = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        alike = hint(path.name, there) or f" (the folder {_shown(path.parent)} has no .yaml files)"
        problems.append(f"{_shown(path)}{by}: no such file{alike}")
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problems.append(f"{_shown(path)}{by}: not valid YAML{place}: {e.problem or e.context}")
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as e:
        problems.append(f"{_shown(path)}{by}: not valid YAML: {str(e).splitlines()[0]}")
    except OSError as e:
        problems.append(f"{_shown(path)}{by}: cannot be read: {e.strerror or e}")
    else:
        if isinstance(own, DictConfig):
            return OmegaConf.to_container(own)
        problems.append(f"{_shown(path)}{by}: holds a list where a recipe has key: value lines")
    return {}


def _command_line(overrides: Sequence[str], problems: list[str]) -> list[Layer]:
    """One layer for each override."""
    layers = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key or key.startswith("-"):
            problems.append(f"{COMMAND_LINE}: {override!r} is not key=value, for example optim.lr=1e-4")
        elif key == "base":
            problems.append(f"{COMMAND_LINE}: base: inheritance belongs into a file; write one with base: [...] in it")
        else:
            try:
                # An empty value is empty text (a shell drops the quotes of init_from="").
                tree = OmegaConf.from_dotlist([override if value.strip() else f'{key}=""'])
                layers.append(Layer(COMMAND_LINE, OmegaConf.to_container(tree)))
            except (yaml.YAMLError, OmegaConfBaseException, ValueError):
                problems.append(
                    f"{COMMAND_LINE}: {key}: {value!r} is not a YAML value; quote special characters, '{key}=\"...\"'"
                )
    return layers


def _apply(config: DictConfig, layer: Layer, origins: dict[str, str], problems: list[str]) -> DictConfig:
    """`config` with a layer's good values merged in; the bad ones become problems."""
    found = list(_leaves(layer.values, Recipe, (), layer.origin, problems))
    for leaf in found:
        key = ".".join(leaf.path)
        for stale in [old for old in origins if old.startswith(key + ".")]:
            if leaf.value is None or _empties(leaf):  # a section switched off takes the origins of what it held with it
                del origins[stale]
        origins[key] = layer.origin
        if _empties(leaf):
            _empty(config, leaf.path)
    try:
        return OmegaConf.merge(config, _tree(found))
    except (OmegaConfBaseException, TypeError, ValueError):
        pass  # one of them is wrong: merge one by one to name each
    for leaf in found:
        try:
            config = OmegaConf.merge(config, _tree([leaf]))
        except (OmegaConfBaseException, TypeError, ValueError):
            problems.append(_wrong_value(layer.origin, leaf))
    return config


def _empties(leaf: Leaf) -> bool:
    """Whether a leaf is an empty mapping of names, which a merge would pass over."""
    return leaf.value == {} and get_origin(bare(leaf.kind)) is dict


def _empty(config: DictConfig, path: tuple[str, ...]) -> None:
    """Take all names out of the mapping at `path`, if it is there."""
    for name in path[:-1]:
        if config.get(name) is None:
            return
        config = config[name]
    with read_write(config):  # frozen, as the dataclass is
        config[path[-1]] = {}


def _leaves(
    values: Mapping[Any, Any], kind: Any, path: tuple[str, ...], origin: str, problems: list[str]
) -> Iterator[Leaf]:
    """Every value of a layer that has a place in the schema; a key without one becomes a problem."""
    for key, value in values.items():
        here = (*path, str(key))
        inner = child(kind, key) if isinstance(key, str) else None
        if not isinstance(key, str):
            problems.append(f"{origin}: {'.'.join(here)}: a key is text; write it in quotes")
        elif inner is None:
            why = refusal(".".join(here)) or f"unknown key{hint(key, sections(bare(kind)))}"
            problems.append(f"{origin}: {'.'.join(here)}: {why}")
        elif is_section(inner) and isinstance(value, Mapping) and value:
            yield from _leaves(value, inner, here, origin, problems)
        elif "${" in str(value):
            problems.append(f"{origin}: {'.'.join(here)}: {value!r} refers to another value; write the value itself")
        else:
            yield Leaf(here, value, inner)


def _from_pretrained(config: DictConfig, part: str, origins: dict[str, str], problems: list[str]) -> DictConfig:
    """`config` with what the part's pretrained folder says and no layer set; disagreements become a problem."""
    section, prefix = config.model[part], f"model.{part}"
    if not (folder := section.pretrained):
        return config
    keys = [key for key, _ in leaves(OmegaConf.to_object(section), f"{prefix}.") if ".moe." not in key]
    if part == "decoder" and "data.tokenizer" not in origins:
        origins["data.tokenizer"] = f"{prefix}.pretrained"
        config = OmegaConf.merge(config, _tree([Leaf(("data", "tokenizer"), folder, None)]))
    if not Path(folder).is_dir() and all(key in origins for key in keys):
        return config  # it says everything, as a checkpoint's own recipe does, and the folder may be long gone
    try:
        found = describe(Path(folder), part)
    except ConfigError as error:
        problems.append(f"{prefix}.pretrained: {error}")
        return config
    free = dict(found.free)
    if part == "connector" and "num_tokens" not in found.fixed:
        rows, columns = OmegaConf.to_object(config.model.vision).grid()
        free["num_tokens"] = rows * columns
    given = {f"{prefix}.{name}": (name, value) for name, value in {**found.fixed, **free}.items()}
    differing = [
        f"{key}={OmegaConf.select(section, name)}, there it is {value}"
        for key, (name, value) in given.items()
        if key in origins and name in found.fixed and OmegaConf.select(section, name) != value
    ]
    if f"{prefix}.vocab_size" in origins and section.vocab_size < free["vocab_size"]:
        differing.append(f"{prefix}.vocab_size={section.vocab_size}, there are {free['vocab_size']}; it can only grow")
    if differing:
        problems.append(f"{prefix}.pretrained={folder} disagrees with the recipe: {'; '.join(differing)}")
    new = {key: value for key, (_, value) in given.items() if key not in origins}
    origins.update(dict.fromkeys(new, f"{folder}/{CONFIG}"))
    return OmegaConf.merge(config, _tree([Leaf(tuple(key.split(".")), value, None) for key, value in new.items()]))


def _tree(found: Sequence[Leaf]) -> dict[str, Any]:
    """Leaves as nested mappings."""
    tree: dict[str, Any] = {}
    for leaf in found:
        section = tree
        for name in leaf.path[:-1]:
            section = section.setdefault(name, {})
        section[leaf.path[-1]] = leaf.value
    return tree


def _wrong_value(origin: str, leaf: Leaf) -> str:
    """What is wrong with a value that omegaconf refused."""
    choices = get_args(bare(leaf.kind)) if get_origin(bare(leaf.kind)) is Literal else ()
    alike = hint(leaf.value, choices) if choices and "known" not in hint(leaf.value, choices) else ""
    key = ".".join(leaf.path)
    why = f": {refused}" if not alike and (refused := refusal(key, leaf.value)) else alike
    return f"{origin}: {key}: {leaf.value!r} is not {wanted(leaf.kind)}{why}"


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Where a key's value comes from: the layer that set it, or the section that holds it."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return origins.get(key, DEFAULT)


def _plain(value: Any) -> str:
    """A value as a recipe would spell it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _shown(path: Path) -> str:
    """A file's name in messages: relative to the working folder where it lies inside it."""
    full = path.resolve()
    here = Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)
