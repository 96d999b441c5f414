"""Moves pieces from whoever has them to all who lack them, each once over the internet. Loads no MLX."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from hippo_mpi.cluster.sync.frames import Data
from hippo_mpi.cluster.sync.links import Links
from hippo_mpi.cluster.sync.pieces import Piece
from hippo_mpi.cluster.sync.place import read_good, told
from hippo_mpi.cluster.sync.site import MAX_STREAMS, LostError, RefusalError, Site
from hippo_mpi.errors import UserError

_TRIES = 3  # of a piece that doesn't arrive as it was sent
HERE, HOSTS, HUB = "here", "hosts", "hub"


class Transfer:
    """Pieces on their way.

    Args:
        sites: of all hosts, this machine's last.
        folder: of the model on this machine.
        hub: where to get what no host has; None: the model is none of the hub's.
        links: by which sites get pieces straight from each other.
        on_arrival: called with the number of a site and the size of each piece that is on its disk.
    """

    def __init__(
        self, sites: Sequence[Site], folder: Path, hub: Site | None, links: Links,
        on_arrival: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        self._sites, self._folder, self._hub, self._links, self._on_arrival = sites, folder, hub, links, on_arrival
        self._counting = threading.Lock()
        self.num_bytes = {HERE: 0, HOSTS: 0, HUB: 0}
        """By where they came from."""
        self.direct = 0
        """Of these, bytes that went straight from host to host, not by ssh."""
        self.failures: dict[int, str] = {}
        """Why a site didn't get everything."""
        self.arrived = [0 for _ in sites]
        """Bytes that each site got."""

    def run(self, pieces: Sequence[Piece]) -> None:
        """Move the pieces; return when all have arrived, or can't."""
        queues: dict[tuple[int, ...], deque[Piece]] = {}
        for piece in pieces:
            queues.setdefault(piece.goal, deque()).append(piece)
        workers = [
            threading.Thread(target=self._work, args=[queue], daemon=True)
            for queue in queues.values()
            for _ in range(min(MAX_STREAMS, len(queue)))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self, queue: deque[Piece]) -> None:
        while True:
            try:
                piece = queue.popleft()
            except IndexError:
                return
            turn = piece.start // max(1, piece.num_bytes) % len(piece.goal)
            sent: tuple[Data, str] | None = None
            holders = [*piece.holders]
            for number in (*piece.goal[turn:], *piece.goal[:turn]):
                if number in self.failures:
                    continue
                if not self._bring(number, piece, holders):
                    try:
                        sent = sent or self._read(piece)
                    except RefusalError as error:
                        self._fail([number], str(error))
                        continue
                    self._write(number, piece, *sent)
                if number not in self.failures:
                    holders.append(number)

    def _bring(self, number: int, piece: Piece, holders: Sequence[int]) -> bool:
        """Have a site get a piece from another; return False if that isn't possible."""
        try:
            holder = self._links.bring(piece, holders, number)
        except (LostError, RefusalError) as error:
            self._fail([number], str(error))
            return True
        if holder is None:
            return False
        with self._counting:
            self.num_bytes[HERE if holder == len(self._sites) - 1 else HOSTS] += piece.num_bytes
            self.direct += piece.num_bytes
        self._arrive(number, piece.num_bytes)
        return True

    def _read(self, piece: Piece) -> tuple[Data, str]:
        """Return a piece and its digest, from the nearest that has it.

        Raises:
            RefusalError: nobody has it, or can be reached; the message is the last one's.
        """
        this = len(self._sites) - 1
        why = f"no host has bytes {piece.start:,} to {piece.stop:,} of {piece.name}"
        if this in piece.holders:
            try:
                data, digest = read_good(self._folder, piece.name, (piece.start, piece.stop))
                self._count(HERE, len(data))
                return data, digest
            except (UserError, OSError) as error:
                why = told(error, self._folder)
        others = [number for number in piece.holders if number != this]
        turn = piece.start // max(1, piece.num_bytes) % max(1, len(others))
        for number in (*others[turn:], *others[:turn]):
            try:
                return self._ask(self._sites[number], piece, HOSTS)
            except (LostError, RefusalError) as error:
                why = f"{self._sites[number].name}: {error}"
        if self._hub:
            try:
                return self._ask(self._hub, piece, HUB)
            except (LostError, RefusalError) as error:
                why = str(error)
        raise RefusalError(why)

    def _ask(self, site: Site, piece: Piece, kind: str) -> tuple[Data, str]:
        for _ in range(_TRIES):
            asked = {"op": "get", "name": piece.name, "start": piece.start, "stop": piece.stop}
            answer, data = site.ask(asked)
            self._count(kind, len(data))
            digest = hashlib.sha256(data).hexdigest()
            if digest == answer.get("digest") and len(data) == piece.num_bytes:
                return data, digest
        raise RefusalError(f"{piece.name} doesn't arrive as it is sent")

    def _write(self, number: int, piece: Piece, data: Data, digest: str) -> None:
        asked = {"op": "put", "name": piece.name, "start": piece.start, "digest": digest}
        try:
            for _ in range(_TRIES):
                if self._sites[number].ask(asked, data)[0].get("is_good") is True:
                    self._arrive(number, len(data))
                    return
            self._fail([number], f"{piece.name} doesn't arrive as it is sent")
        except (LostError, RefusalError) as error:
            self._fail([number], str(error))

    def _arrive(self, number: int, count: int) -> None:
        with self._counting:
            self.arrived[number] += count
        self._on_arrival(number, count)

    def _fail(self, numbers: Sequence[int], why: str) -> None:
        for number in numbers:
            self.failures.setdefault(number, why)

    def _count(self, kind: str, count: int) -> None:
        with self._counting:
            self.num_bytes[kind] += count
