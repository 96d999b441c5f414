"""Which rank does what: copies of the model, groups of layers one behind the other, and parts of each layer."""

from __future__ import annotations

from dataclasses import dataclass

from hippo_mpi.errors import LaunchError


@dataclass(frozen=True)
class Place:
    """Where a rank is in a layout."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True)
class Layout:
    """How ranks share a model. Those of a replica follow each other, and those of a stage in it.

    Args:
        stages: groups of layers; each hands its hidden states to the next, and the last one back to the first.
        replicas: copies of the whole model.
        shards: parts of every layer of a stage.
    """

    stages: int
    replicas: int = 1
    shards: int = 1

    def __str__(self) -> str:
        return f"replicas {self.replicas} x stages {self.stages} x shards {self.shards} = {self.num_ranks}"

    @property
    def num_ranks(self) -> int:
        """Return how many ranks it takes."""
        return self.replicas * self.stages * self.shards

    def check(self, num_ranks: int) -> None:
        """Raise a LaunchError unless so many ranks are there."""
        if self.num_ranks != num_ranks:
            raise LaunchError(f"{self} ranks, but there are {num_ranks}")

    def place(self, rank: int) -> Place:
        """Return where a rank is."""
        replica, rest = divmod(rank, self.stages * self.shards)
        return Place(replica, *divmod(rest, self.shards))

    def neighbours(self, rank: int) -> tuple[int, int]:
        """Return the ranks of the stages before and behind, in the ring of a replica and a shard."""
        at = self.place(rank)
        first = at.replica * self.stages * self.shards + at.shard
        before, behind = (at.stage - 1) % self.stages, (at.stage + 1) % self.stages
        return first + before * self.shards, first + behind * self.shards
