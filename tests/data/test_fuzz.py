from tests.data.fuzz import CASES, campaign


def test_nothing_that_is_read_can_crash_or_hang_the_reader() -> None:
    """A part of the campaign; all of it: python -m tests.data.fuzz --count 5000."""
    outcomes = campaign(240, seed=0)
    kinds = {kind.__name__ for kind in CASES}
    assert sum(outcomes.values()) == 240
    assert {name.partition(":")[0] for name in outcomes} == kinds
    # The mutations reach every way out: a refused file, a line in the ledger, a sample that stays good.
    assert {name.partition(": ")[2] for name in outcomes} >= {"refused", "ledger", "good", "damage"}
