"""How many samples of a stream were unusable, over all ranks: too many stop the run, on every rank at the same step."""

from collections.abc import Mapping
from types import MappingProxyType

from mmtrain.config.errors import DataError
from mmtrain.data.record import Step
from mmtrain.parallel.groups import Groups
from mmtrain.totals import StepSums

MIN_SAMPLES = 100
"""No run is stopped for its share of bad samples before it has read this many."""

READ, BAD = "samples/read", "samples/bad"
"""Names of the counts among a checkpoint's metrics."""


class SampleCount:
    """Samples read since the run's first step, whatever ranks and starts of the command they were read by."""

    def __init__(self, most: float, saved: Mapping[str, float] = MappingProxyType({})) -> None:
        """most: data.max_bad_fraction. saved: metrics of the checkpoint that a run goes on from."""
        self._most = most
        self.read, self.bad = int(saved.get(READ, 0)), int(saved.get(BAD, 0))

    def as_json(self) -> dict[str, int]:
        """The counts for a checkpoint's metrics."""
        return {READ: self.read, BAD: self.bad}

    def add(self, sums: StepSums, data: Step, groups: Groups) -> None:
        """Take in a step's sums over all ranks, and this rank's own step.

        DataError, on every rank: too large a share of the samples read so far was unusable. Collective then.
        """
        self.read += sums.samples
        self.bad += sums.bad
        if not sums.bad or self.read < MIN_SAMPLES or self.bad <= self._most * self.read:
            return
        last = [line for lines in groups.all_gather_object(data.bad[-1:]) for line in lines][-1]
        raise DataError(
            f"data: {self.bad} of {self.read} samples read so far were unusable, more than "
            f"data.max_bad_fraction={self._most}; the last one: shard {last['shard']}, sample {last['key']}: "
            f"{last['reason']}; repair the shards, or raise data.max_bad_fraction"
        )
