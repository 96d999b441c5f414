"""Who can lend to whom, and how fast: straight from host to host, by addresses of the hostfile. Loads no MLX."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from hippo_mpi.cluster.sync.direct import Address, read_addresses
from hippo_mpi.cluster.sync.pieces import Piece
from hippo_mpi.cluster.sync.site import LostError, RefusalError, Site
from hippo_mpi.units import visible

_TRIES = 3  # of a piece that doesn't arrive as it was sent
_Lent = tuple[Address, frozenset[str]]


class Links:
    """Links between sites.

    Args:
        sites: of all hosts.
        ips: of each, the addresses for data.
        on_failure: told, in one line, that a link has failed, of which no more use is made.
    """

    def __init__(self, sites: Sequence[Site], ips: Sequence[Sequence[str]], on_failure: Callable[[str], None]) -> None:
        self._sites, self._ips, self._on_failure = sites, ips, on_failure
        self._key = secrets.token_hex(32)
        self._asking = [threading.Lock() for _ in sites]
        self._lends: dict[int, list[_Lent]] = {}
        self._failed: set[tuple[int, int]] = set()
        self._paces: dict[tuple[int, int], float] = {}  # seconds per byte of the last piece
        self._counting = threading.Lock()

    def bring(self, piece: Piece, holders: Iterable[int], goal: int) -> int | None:
        """Have a site get a piece from another one, by the fastest link that there is.

        Args:
            piece: which.
            holders: numbers of the sites that have it.
            goal: number of the site that gets it.

        Returns:
            The number of the site that it came from; None: there is no such link.

        Raises:
            LostError, RefusalError: the site can't keep it, or is lost itself.
        """
        for holder in sorted(holders, key=lambda one: self._paces.get((one, goal), 0.0)):
            if (holder, goal) not in self._failed and (addresses := self._addresses(holder, goal)):
                began_s = time.monotonic()
                if self._borrow(piece, holder, goal, addresses):
                    self._paces[holder, goal] = (time.monotonic() - began_s) / piece.num_bytes
                    return holder
        return None

    def _borrow(self, piece: Piece, holder: int, goal: int, addresses: Sequence[Address]) -> bool:
        asked = {
            "op": "borrow", "name": piece.name, "start": piece.start, "stop": piece.stop, "from": addresses,
            "key": self._key,
        }  # fmt: skip
        for _ in range(_TRIES):
            answer, _ = self._sites[goal].ask(asked)
            if answer.get("is_good") is True:
                return True
            if "not_lent" in answer:  # another has it, perhaps
                return False
            if "link" in answer:
                self._fail(holder, goal, visible(str(answer["link"])))
                return False
        self._fail(holder, goal, f"{piece.name} doesn't arrive as it is sent")
        return False

    def _fail(self, holder: int, goal: int, why: str) -> None:
        with self._counting:
            is_new = (holder, goal) not in self._failed
            self._failed.add((holder, goal))
        if is_new:
            names = f"{self._sites[holder].name} to {self._sites[goal].name}"
            self._on_failure(f"no direct way from {names} ({why}): the rest goes through this machine, by ssh")

    def _addresses(self, holder: int, goal: int) -> list[Address]:
        """Return where a site lends to another: by the networks that both are in first."""
        with self._asking[holder]:
            if holder not in self._lends:
                self._lends[holder] = self._ask_to_lend(holder) if any(self._ips) else []
        beside = [address for address, others in self._lends[holder] if others & {*self._ips[goal]}]
        own = [address for address, _ in self._lends[holder] if address[0] in self._ips[holder]]
        return [*dict.fromkeys([*beside, *own])]

    def _ask_to_lend(self, holder: int) -> list[_Lent]:
        others = sorted({ip for number, ips in enumerate(self._ips) if number != holder for ip in ips})
        asked = {"op": "lend", "key": self._key, "own": list(self._ips[holder]), "others": others}
        try:
            answer, _ = self._sites[holder].ask(asked)
            return [
                (address, frozenset(map(str, beside)))
                for (host, port, beside) in answer["lends"]
                for address in read_addresses([[host, port]])
            ]
        except (LostError, RefusalError, KeyError, TypeError, ValueError):
            return []  # what can't be brought without it says why
