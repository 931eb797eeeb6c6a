"""tools.parity: which layouts it runs, what it keeps, and its answer for the layout of a recipe."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mmtrain.config.errors import ConfigError
from mmtrain.config.schema import Parallel
from tests import dist
from tests.parallel import job, matrix
from tests.parallel.matrix import Case, Line
from tools import parity

CASE = Case(2, 1, 2, 1, 1, "sgd", True, False)


def test_layouts_are_named_by_four_numbers() -> None:
    found = parity.chosen(False, ["2.1.2.1"])
    assert {case[:4] for case in found} == {(2, 1, 2, 1)} and len(found) == 11
    assert parity.chosen(True, []) == matrix.full() and parity.chosen(False, []) == matrix.covering()
    with pytest.raises(ConfigError, match=r"--layouts 2.1.2: four numbers are needed, world.stage.tensor.expert"):
        parity.chosen(False, ["2.1.2"])
    with pytest.raises(ConfigError, match=r"--layouts 5.1.1.1: no such layout; world is one of \[1, 2, 3, 4, 6, 8\]"):
        parity.chosen(False, ["5.1.1.1"])


def test_a_line_comes_back_from_the_file_and_half_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    line = Line(CASE, "", "", {"loss": 1e-7}, {"loss": ""}, 0)
    path.write_text(json.dumps(parity.as_json(line)) + "\n" + '{"case": "cut of')
    assert parity.read(path) == {str(CASE): parity.as_json(line)} and parity.read(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (Line(CASE, "", "", {"param": 2e-6}, {"param": "w"}, 0), 0, "equal  2.0e-06"),
        (Line(CASE, "", "", {"param": 2e-3}, {"param": "w"}, 0), 1, "DIFFERENT  2.0e-03  param 2.0e-03 w"),
        (Line(CASE, "", "", {"loss": float("nan")}, {"loss": ""}, 0), 1, "DIFFERENT  nan"),
        (Line(CASE, "rank 1 died", "", {}, {}, 0), 1, "FAILED\nrank 1 died"),
    ],
)
def test_a_case_is_described_and_decides_the_exit_code(
    line: Line, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "noise_floor", lambda: dict.fromkeys(parity.KINDS, 0.0))
    assert words in parity.describe(line)
    assert parity.summarise([parity.as_json(line)]) == code


def on_this_job(recipe: str) -> tuple[int, str]:
    """On a rank: the command as a launcher starts it; its exit code and what it prints."""
    sys.argv = ["parity", "--local_rank=0", recipe, "parallel.expert=2"]
    with redirect_stdout(io.StringIO()) as printed:
        code = parity.main()
    return code, printed.getvalue()


def test_the_layout_of_a_recipe_on_the_ranks_of_a_job(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: job\nout: runs/job\ndata: {tokenizer: none.json}\nparallel: {zero_stage: 2, precision: bf16}\n"
    )
    (first, printed), (second, nothing) = dist.run(on_this_job, 2, str(recipe))
    assert first == second == 0 and nothing == ""
    assert "2 ranks = 2 data x 1 tensor, 2 expert, ZeRO-2, fp32" in printed and "equal: largest" in printed


def test_a_tensor_size_that_the_tiny_recipe_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensor=8: the tiny recipe that is compared has 4 key/value heads"):
        job.compare_layout(Parallel(tensor=8))
