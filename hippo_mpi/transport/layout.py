"""Maps ranks to replicas (copies of the model), stages (consecutive layers) and shards (parts of each layer)."""

from __future__ import annotations

from dataclasses import dataclass

from hippo_mpi.errors import LaunchError


@dataclass(frozen=True)
class Place:
    """A rank's position in a layout."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True)
class Layout:
    """How ranks share a model; the ranks of a replica are consecutive, and so are those of a stage within it.

    Args:
        stages: groups of layers; each sends its hidden states to the next, the last one back to the first.
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
        """Return how many ranks the layout takes."""
        return self.replicas * self.stages * self.shards

    def check(self, num_ranks: int) -> None:
        """Check that the layout takes exactly this many ranks.

        Raises:
            LaunchError: it doesn't; the error has the equation.
        """
        if self.num_ranks != num_ranks:
            raise LaunchError(f"{self} ranks, but there are {num_ranks}")

    def place(self, rank: int) -> Place:
        """Return a rank's position."""
        replica, rest = divmod(rank, self.stages * self.shards)
        return Place(replica, *divmod(rest, self.shards))

    def neighbours(self, rank: int) -> tuple[int, int]:
        """Return the ranks of the previous and the next stage, in the ring of this rank's replica and shard."""
        at = self.place(rank)
        first = at.replica * self.stages * self.shards + at.shard
        before, behind = (at.stage - 1) % self.stages, (at.stage + 1) % self.stages
        return first + before * self.shards, first + behind * self.shards
