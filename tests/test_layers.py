"""Imports only point down, each heavy library has one door, and files stay short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "config": {"config"},
    "mup": {"mup", "config"},
    "model": {"model", "config", "mup.roles"},
    "data": {"data", "config"},
    "parallel": {"parallel", "config", "model", "mup"},
    "optim": {"optim", "config", "mup"},
    "run": {"run", "config", "parallel"},
    "convert": {"convert", "config", "data", "model", "mup", "parallel.box", "run"},
    "evaluate": {"evaluate", "config", "model", "data"},
    "sweep": {"sweep", "config", "data", "model", "run", "mup", "train"},
}
"""Package of mmtrain -> what it may import from mmtrain, itself included. train.py may import everything."""

ONE_FILE = "mmtrain/convert/modeling_mmtrain.py"
"""Goes into exported folders as their only code: it may import transformers, and is as long as a model is."""

DOOR = {
    "omegaconf": "mmtrain/config/load.py",
    "mup": "mmtrain/mup/",
    "webdataset": ("mmtrain/data/", "tools/bench/loader.py"),  # which compares with it
    "megatron": "mmtrain/parallel/",
    "deepspeed": "mmtrain/parallel/",
    "wandb": "mmtrain/run/",
    "transformers": (ONE_FILE, "tools/fetch_smollm2.py", "tools/compare_hf.py", "tools/ask_hf.py"),
    "optuna": "mmtrain/sweep/study.py",
}
"""Heavy library -> the only files or folders that import it."""

KNOWS_NO_RANKS = ("config", "mup", "model", "data", "optim")
"""Packages that never touch torch.distributed."""

OUTSIDE = ("launch", "tools", "tests")
"""Folders that import mmtrain and are never imported by it."""

LONGEST_FILE = 350

# zero_stage is DeepSpeed's word; connector.stage1 and stage2 are the names of RegNet stages.
STAGE = re.compile(r"(?<!zero_)(?<!connector\.)stage", re.IGNORECASE)

# In parallel/ the word means ZeRO's stages, which is what DeepSpeed calls them.
STAGE_BLIND = sorted(path for path in (ROOT / "mmtrain").rglob("*.py") if path.parent.name != "parallel")

SOURCES = sorted(path for folder in ("mmtrain", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))


def imported(where: str, tree: ast.AST) -> Iterator[str]:
    """Every module or name that a file imports, absolute and dotted, wherever in the file the import stands."""
    package = where.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def within(name: str, allowed: str) -> bool:
    """Whether dotted `name` is `allowed` or lies below it."""
    return name == allowed or name.startswith(allowed + ".")


def import_faults(where: str, source: str) -> list[str]:
    """Forbidden imports of the file at `where` (relative to the repository)."""
    faults = []
    parts = where.split("/")
    package = parts[1] if parts[0] == "mmtrain" and len(parts) > 2 else None
    for name in imported(where, ast.parse(source)):
        head, _, rest = name.partition(".")
        if head == "mmtrain" and package and not any(within(rest, allowed) for allowed in MAY_IMPORT[package]):
            faults.append(f"{where} may not import {name}")
        if head in OUTSIDE and parts[0] == "mmtrain":
            faults.append(f"{where} may not import {name}: mmtrain does not know {head}/")
        if head in DOOR and not where.startswith(DOOR[head]):
            faults.append(f"{where} may not import {name}: its door is {DOOR[head]}")
        if package in KNOWS_NO_RANKS and within(name, "torch.distributed"):
            faults.append(f"{where} may not import {name}: {package}/ does not know that it is distributed")
    return faults


def conditions(tree: ast.AST) -> Iterator[str]:
    """Source text of every condition."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            yield ast.unparse(node.test)
        elif isinstance(node, ast.comprehension):
            yield from map(ast.unparse, node.ifs)
        elif isinstance(node, ast.Match):
            yield ast.unparse(node.subject)


def test_every_package_of_mmtrain_has_a_place_in_the_layers():
    packages = {path.name for path in (ROOT / "mmtrain").iterdir() if (path / "__init__.py").exists()}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_use_the_doors(path):
    assert import_faults(path.relative_to(ROOT).as_posix(), path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_reader_can_hold(path):
    longest = LONGEST_FILE if path != ROOT / ONE_FILE else 450
    assert len(path.read_text().splitlines()) <= longest


@pytest.mark.parametrize("path", STAGE_BLIND, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_condition_asks_for_the_stage(path):
    assert [text for text in conditions(ast.parse(path.read_text())) if STAGE.search(text)] == []


@pytest.mark.parametrize(
    ("where", "source", "fault"),
    [
        ("mmtrain/config/load.py", "import mmtrain.model", "may not import mmtrain.model"),
        ("mmtrain/model/vlm.py", "from mmtrain.mup import rules", "may not import mmtrain.mup.rules"),
        ("mmtrain/model/vlm.py", "from mmtrain.mup.registry import build", "may not import mmtrain.mup.registry.build"),
        ("mmtrain/data/pack.py", "from ..model import vlm", "may not import mmtrain.model.vlm"),
        ("mmtrain/data/pack.py", "def f():\n    import torch.distributed as d", "does not know that it is distributed"),
        ("mmtrain/model/vlm.py", "from torch import distributed", "does not know that it is distributed"),
        ("mmtrain/model/vlm.py", "import torch\ntorch.distributed.barrier()", "does not know that it is distributed"),
        ("mmtrain/run/log.py", "import tools.plan", "mmtrain does not know tools/"),
        ("mmtrain/train.py", "from omegaconf import OmegaConf", "its door is mmtrain/config/load.py"),
        ("tools/plan.py", "import deepspeed.comm", "its door is mmtrain/parallel/"),
        ("mmtrain/optim/groups.py", "import mup", "its door is mmtrain/mup/"),
    ],
)
def test_a_forbidden_import_is_found(where, source, fault):
    faults = import_faults(where, source)
    assert faults and all(fault in line for line in faults)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("mmtrain/model/vlm.py", "from mmtrain.mup.roles import Role\nfrom .norm import RMSNorm\nimport torch"),
        ("mmtrain/mup/shapes.py", "import mup\nfrom mmtrain.config.schema import Model"),
        ("mmtrain/parallel/groups.py", "import torch.distributed\nfrom megatron.core import parallel_state"),
        ("mmtrain/train.py", "from mmtrain.evaluate import tasks\nfrom mmtrain.run import log"),
        ("launch/train.py", "from mmtrain.train import main"),
    ],
)
def test_an_allowed_import_passes(where, source):
    assert import_faults(where, source) == []


def test_a_condition_on_the_stage_is_found():
    source = "if recipe.stage == 3:\n    pass\nx = [y for y in z if name == 'stage1_align']\nif recipe.zero_stage: pass"
    assert [text for text in conditions(ast.parse(source)) if STAGE.search(text)] == [
        "recipe.stage == 3",
        "name == 'stage1_align'",
    ]
