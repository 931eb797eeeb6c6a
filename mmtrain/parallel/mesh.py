"""Where a rank stands in world = data x tensor, with expert dividing data. Arithmetic only, without processes.

The tensor coordinate is the fastest: rank = data_rank * tensor + tensor_rank. Expert ranks are neighbours in the data
dimension: data_rank = replica * expert + expert_rank. megatron-core's order "tp-cp-ep-dp-pp" is the same one.
"""

from dataclasses import dataclass

from mmtrain.config.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """The layout of `world` ranks.

    world   number of processes.
    tensor  ranks that share each matrix.
    expert  data ranks that share each layer's experts.
    """

    world: int
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        if self.tensor < 1 or self.expert < 1:
            raise ConfigError(f"parallel.tensor = {self.tensor} and parallel.expert = {self.expert} must be at least 1")
        if self.world < 1 or self.world % self.tensor or (self.world // self.tensor) % self.expert:
            step = self.tensor * self.expert
            below, above = self.world // step * step, (self.world // step + 1) * step
            fits = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"parallel: {self.world} processes cannot hold tensor = {self.tensor} and expert = {self.expert}: "
                f"their number must be a multiple of {self.tensor} x {self.expert} = {step}. Start {fits}, or "
                "change parallel.tensor or parallel.expert"
            )

    @property
    def data(self) -> int:
        """Data-parallel size: ranks that see different packs."""
        return self.world // self.tensor

    @property
    def replicas(self) -> int:
        """Copies of each expert: data / expert."""
        return self.data // self.expert

    def tensor_rank(self, rank: int) -> int:
        """Position among the ranks that share a matrix."""
        return rank % self.tensor

    def data_rank(self, rank: int) -> int:
        """Position among the ranks that see different packs."""
        return rank // self.tensor

    def expert_rank(self, rank: int) -> int:
        """Which slice of the experts the rank holds."""
        return self.data_rank(rank) % self.expert

    def replica(self, rank: int) -> int:
        """Which copy of its experts the rank holds."""
        return self.data_rank(rank) // self.expert

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share a matrix, one list a group."""
        return self._groups(lambda rank: self.data_rank(rank))

    def data_groups(self) -> list[list[int]]:
        """Ranks with the same slice of the matrices and different packs."""
        return self._groups(lambda rank: self.tensor_rank(rank))

    def expert_groups(self) -> list[list[int]]:
        """Ranks that exchange tokens: together they hold every expert."""
        return self._groups(lambda rank: (self.replica(rank), self.tensor_rank(rank)))

    def replica_groups(self) -> list[list[int]]:
        """Ranks with the same slice of the same experts (expert-data parallel)."""
        return self._groups(lambda rank: (self.expert_rank(rank), self.tensor_rank(rank)))

    def _groups(self, key) -> list[list[int]]:
        groups: dict[object, list[int]] = {}
        for rank in range(self.world):
            groups.setdefault(key(rank), []).append(rank)
        return list(groups.values())

    def __str__(self) -> str:
        return f"{self.world} ranks = {self.data} data x {self.tensor} tensor, {self.expert} expert"
