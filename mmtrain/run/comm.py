"""What run/ needs from a process group. parallel.groups implements it; tools and tests use one process."""

from dataclasses import dataclass
from typing import Any, Protocol


class Comm(Protocol):
    """A group of ranks that call the same functions in the same order, on their main threads."""

    rank: int
    world: int

    def barrier(self) -> None:
        """Return when every rank is here."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""


@dataclass(frozen=True)
class SingleProcess:
    """The group of one."""

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]
