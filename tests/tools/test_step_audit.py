"""The audit as a command; that it sees wrong rates is in tests/parallel/test_audit.py."""

import json
import sys
from pathlib import Path

import pytest

from tests.parallel import audit
from tools import step_audit
from tools.bench import record

TENSOR = "decoder.blocks.0.attention.q.weight"


def test_the_command_audits_a_layout_and_keeps_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [str(record.ROOT / "tools" / "step_audit.py"), "1.1.1.1", "--save"])
    assert step_audit.main() == 0
    kept = json.loads((tmp_path / "step_audit.json").read_text())
    assert kept["command"] == "python -m tools.step_audit 1.1.1.1 --save"
    assert kept["largest_deviation"] <= kept["target"] == audit.TOLERANCE
    layout, tensor = kept["layouts"]["1.1.1.1"], kept["tensors"][TENSOR]
    assert layout["same_start"] and layout["tensors"] == len(kept["tensors"]) and layout["left_out"] == {}
    assert tensor["lr_multiplier"] == 0.5 and abs(tensor["smallest"] - 1) <= audit.TOLERANCE
    extremes = [kept["tensors"][name][end] for name in kept["tensors"] for end in ("smallest", "largest")]
    assert (layout["smallest"], layout["largest"]) == (min(extremes), max(extremes))
    printed = capsys.readouterr().out
    assert TENSOR in printed and "1.1.1.1" in printed


def found(layout: str, ratio: float, same_start: bool = True) -> step_audit.Found:
    """An audit in which one tensor has this ratio and all others have no gradient."""
    rows = [
        audit.Row(name, float("nan"), 0, "its gradient is zero") for name in step_audit._entries() if name != TENSOR
    ]
    return step_audit.Found(layout, [*rows, audit.Row(TENSOR, ratio, 5, "")], same_start)


@pytest.mark.parametrize(
    ("audits", "code"),
    [
        ([found("1.1.1.1", 1.0), found("2.1.1.1", 1.0)], 0),
        ([found("1.1.1.1", 1.0), found("2.1.1.1", 0.998)], 1),
        ([found("1.1.1.1", 1.0), found("2.1.1.1", 1.0, same_start=False)], 1),
    ],
)
def test_a_wrong_rate_or_another_start_in_any_layout_is_the_exit_code(
    audits: list[step_audit.Found], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_audit, "audits", lambda layouts: audits)
    monkeypatch.setattr(sys, "argv", ["step_audit"])
    assert step_audit.main() == code


def test_every_stage_meets_tensor_and_expert_ranks() -> None:
    cut = {tuple(map(int, layout.split("."))) for layout in step_audit.LAYOUTS}
    for stage in (1, 2, 3):
        assert {(tensor, expert) for _, s, tensor, expert in cut if s == stage} == {(1, 1), (2, 1), (1, 2), (2, 2)}
    assert {(tensor, expert) for _, stage, tensor, expert in cut if stage == 0} == {(1, 1), (2, 1)}
