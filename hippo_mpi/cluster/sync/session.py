"""One sync: hosts opened, verified, prepared and filled. Loads no MLX."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.sync.frames import PIECE_BYTES
from hippo_mpi.cluster.sync.links import Links
from hippo_mpi.cluster.sync.model_files import read_spans, read_sums
from hippo_mpi.cluster.sync.needs import Needs
from hippo_mpi.cluster.sync.pieces import Content, missing, pieces_to_move
from hippo_mpi.cluster.sync.site import LostError, RefusalError, Site, command_of
from hippo_mpi.cluster.sync.transfer import HERE, HOSTS, HUB, Transfer
from hippo_mpi.errors import RankError, UserError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import show_bytes, visible
from hippo_mpi.views.spans import Span, merged, num_bytes

_HUB = "-m hippo_mpi.checkpoint.hub_place"


@dataclass
class HostState:
    """A host, and how far it is.

    Args:
        host: as the hostfile has it.
        ranks: that it runs.
        needs: spans by files.
        here: what it has of the model.
        came: bytes that this sync brought.
        damaged: bytes that verifying found changed.
        unchecked: bytes that verifying couldn't check.
        error: why it isn't filled; empty: it is.
        code: exit status that goes with the error.
        opened: what it said when it was opened.
        compared: whole files that it has compared with the hub.
        mismatched: those of them that weren't what the hub has.
    """

    host: Host
    ranks: list[int]
    needs: dict[str, list[Span]]
    here: dict[str, list[Span]] = field(default_factory=dict)
    was_here: int = 0
    came: int = 0
    damaged: int = 0
    unchecked: int = 0
    error: str = ""
    code: int = 0
    opened: dict[str, Any] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)
    mismatched: list[str] = field(default_factory=list)

    @property
    def lacks(self) -> dict[str, list[Span]]:
        """Return what it needs and doesn't have."""
        return {} if self.error else missing(self.needs, self.here)

    def fail(self, error: Exception) -> None:
        """Leave the host out, and keep why."""
        self.error, self.code = str(error), RankError.exit_code if isinstance(error, LostError) else UserError.exit_code


class SyncSession:
    """Programs on all hosts for as long as the sync lasts.

    Args:
        hosts: this machine's last, also if it runs no rank.
        needs: what is to be where.
        folder: in which ranks work.
        envs: of every rank.
        environment: of this process, and of all that it starts.
        timeout_s: for a host to answer.
    """

    def __init__(
        self, hosts: Sequence[HostState], needs: Needs, folder: str, envs: Mapping[str, str],
        environment: Mapping[str, str], timeout_s: float,
    ) -> None:  # fmt: skip
        self.hosts, self._needs = hosts, needs
        errand = {"environment": dict(envs), "folder": folder, "model": needs.files.as_object()}
        self._sites = [
            Site(state.host.ssh, command_of(state.host, connect_s=timeout_s), errand, timeout_s, environment)
            for state in hosts
        ]
        here = command_of(Host(THIS_MACHINE), _HUB)
        self._hub = Site("the hub", here, errand, timeout_s, environment) if needs.files.repo else None
        self.num_bytes = {HERE: 0, HOSTS: 0, HUB: 0}
        self.direct = 0
        self.notes: list[str] = []
        """Links that failed, and files that weren't what the hub has; a line each, as they were told."""
        self.took_s = 0.0
        self._came: list[set[str]] = [set() for _ in hosts]
        self._tell: Callable[[str], None] = lambda line: None

    def open(self) -> None:
        """Ask all hosts what they have."""
        self._on_all(self._open)
        for state in self.hosts:
            state.was_here = num_bytes(span for name, spans in state.needs.items() for span in spans) - _size(
                state.lacks
            )

    def verify(self) -> None:
        """Have all hosts look whether what they have is as it arrived."""
        self._on_all(self._verify)
        self._on_all(self._open)

    def prepare(self) -> None:
        """Give every host the small files and the heads of weight files, as a whole."""
        self._on_all(self._prepare)
        self._on_all(self._open)

    def fill(self, on_arrival: Callable[[int, int], None], tell: Callable[[str], None]) -> None:
        """Move what hosts lack.

        Args:
            on_arrival: called with the number of a host and the size of each piece that is on its disk.
            tell: told, from now on, each of the notes at once.
        """
        self._tell = tell
        self._came = [{*state.lacks} for state in self.hosts]
        self._move([{} if state.error else state.here for state in self.hosts], on_arrival)
        if self._needs.files.link:
            self._on_all(lambda site, state: site.ask({"op": "link"}))

    def compare(self, everything: bool) -> None:
        """Have hosts compare whole files of a repo with the hub's SHA-256; what isn't the same is fetched again.

        Args:
            everything: whether also files of which nothing came just now.
        """
        names = [{*self._needs.files.sizes} if everything else came for came in self._came]
        asked = sorted(
            {name for state, some in zip(self.hosts, names, strict=True) for name in self._whole(state, some)}
        )
        if not self._hub or not asked:
            return
        try:
            sums = read_sums(self._hub.ask({"op": "sums", "names": asked})[0].get("sums"), asked)
        except (LostError, RefusalError) as error:
            self._note(f"nothing is compared with the hub's SHA-256: {error}")
            return
        self._compare_all(names, sums)
        if doubted := {name for state in self.hosts for name in state.mismatched}:
            self._compare_all([doubted - state.compared for state in self.hosts], sums)  # it may have come from there
            self._fetch_again(doubted, sums)

    def _fetch_again(self, doubted: set[str], sums: Mapping[str, str]) -> None:
        """Get files again that weren't what the hub has, from those that have the same as the hub, or from there."""
        for state in self.hosts:
            for name in state.mismatched:
                again = " and is fetched again" if name in state.needs else ""
                self._note(f"{state.host.ssh}: {name} isn't what the hub has{again}")
        self._on_all(self._open)
        self._move([_without(state, doubted) for state in self.hosts], lambda number, count: None)
        still = self._compare_all([{*state.mismatched} for state in self.hosts], sums)
        for state, names in zip(self.hosts, still, strict=True):
            if names and not state.error:
                state.fail(RefusalError(f"{', '.join(names)} isn't what the hub has, also when fetched again"))

    def _whole(self, state: HostState, names: Iterable[str]) -> list[str]:
        """Return those files of which a host has every byte."""
        sizes = self._needs.files.sizes
        return [] if state.error else [name for name in sorted(names) if state.here.get(name) == [(0, sizes[name])]]

    def _compare_all(self, names: Sequence[set[str]], sums: Mapping[str, str]) -> list[list[str]]:
        """Have each host compare its whole ones of some files; return those that aren't the same."""
        found: dict[str, list[str]] = {}
        wanted = {
            state.host.ssh: {name: sums[name] for name in self._whole(state, some) if name in sums}
            for state, some in zip(self.hosts, names, strict=True)
        }

        def compare(site: Site, state: HostState) -> None:
            if asked := wanted[state.host.ssh]:
                found[state.host.ssh] = self._compare(site, state, asked)

        self._on_all(compare)
        return [found.get(state.host.ssh, []) for state in self.hosts]

    def _compare(self, site: Site, state: HostState, asked: Mapping[str, str]) -> list[str]:
        answer, _ = site.ask({"op": "compare", "sums": dict(asked)})
        try:
            bad = [name for name in asked if name in answer["bad"]]
            state.unchecked = max(0, state.unchecked - _count(answer["checked"]))
        except (KeyError, TypeError, ValueError):
            raise RefusalError("an answer that can't be read") from None
        state.compared |= {*asked}
        state.mismatched = [*dict.fromkeys([*state.mismatched, *bad])]
        return bad

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self._tell(line)

    def _move(self, lends: Sequence[Content], on_arrival: Callable[[int, int], None]) -> None:
        """Move what hosts lack, from those that lend it, or the hub."""
        pieces = pieces_to_move([state.lacks for state in self.hosts], lends, PIECE_BYTES)
        links = Links(self._sites, [state.host.ips for state in self.hosts], self._note)
        transfer = Transfer(self._sites, self._needs.folder, self._hub, links, on_arrival)
        began_s = time.monotonic()
        transfer.run(pieces)
        self.took_s += time.monotonic() - began_s
        self.direct += transfer.direct
        for kind, count in transfer.num_bytes.items():
            self.num_bytes[kind] += count
        for number, state in enumerate(self.hosts):
            state.came += transfer.arrived[number]
            if number in transfer.failures:
                lost = self._sites[number].lost
                state.fail(LostError(lost) if lost else RefusalError(transfer.failures[number]))
        self._on_all(self._check)

    def close(self) -> None:
        """End all programs."""
        with ThreadPoolExecutor(len(self._sites) + 1) as pool:
            list(pool.map(lambda site: site.close(), [*self._sites, *filter(None, [self._hub])]))

    def _on_all(self, act: Callable[[Site, HostState], object]) -> None:
        def one(site: Site, state: HostState) -> None:
            if state.error:
                return
            try:
                act(site, state)
            except (LostError, RefusalError, UserError) as error:
                state.fail(error)

        with ThreadPoolExecutor(len(self._sites)) as pool:
            list(pool.map(one, self._sites, self.hosts))

    def _open(self, site: Site, state: HostState) -> None:
        answer, _ = site.ask({"op": "open", "small": [*self._needs.small]})
        try:
            state.opened = {
                "free": _count(answer["free"]), "small": dict(answer["small"]), "is_kept": answer["is_kept"] is True,
                "is_made": answer["is_made"] is True, "folder": visible(str(answer["folder"])),
            }  # fmt: skip
            state.here = read_spans(answer["here"], self._needs.files.sizes)
        except (KeyError, TypeError, ValueError):
            raise RefusalError("an answer that can't be read") from None

    def _verify(self, site: Site, state: HostState) -> None:
        answer, _ = site.ask({"op": "verify"})
        try:
            state.damaged, state.unchecked = _count(answer["bad"]), _count(answer["unchecked"])
        except (KeyError, ValueError):
            raise RefusalError("an answer that can't be read") from None

    def _prepare(self, site: Site, state: HostState) -> None:
        lacks, free = _size(state.lacks), state.opened["free"]
        if lacks > free:
            raise RefusalError(
                f"{show_bytes(lacks)} are missing there, and {show_bytes(free)} free for {state.opened['folder']}: make"
                " room, or set HF_HOME to a bigger disk"
            )
        if state.opened["is_kept"] or self._sites[-1] is site:
            return
        for name in self._needs.small:
            path = self._needs.folder / name
            data = path.read_bytes()
            if state.opened["small"].get(name) != hashlib.sha256(data).hexdigest():
                _stage(site, name, data)
        for name, size in self._needs.heads.items() if not state.opened["is_made"] else ():
            with (self._needs.folder / name).open("rb") as stream:
                _stage(site, name, stream.read(size))
        site.ask({"op": "commit"})

    def _check(self, site: Site, state: HostState) -> None:
        self._open(site, state)
        if left := _size(state.lacks):
            raise RefusalError(f"{show_bytes(left)} didn't arrive")


def _count(found: object) -> int:
    """Return a number of bytes that a host says.

    Raises:
        ValueError: it is none.
    """
    if type(found) is not int or found < 0:
        raise ValueError("no number of bytes")
    return found


def _stage(site: Site, name: str, data: bytes) -> None:
    for start in range(0, max(1, len(data)), PIECE_BYTES):
        site.ask({"op": "stage", "name": name, "start": start}, data[start : start + PIECE_BYTES])


def _without(state: HostState, doubted: set[str]) -> Content:
    """Return what a host may lend: of doubted files only those that are what the hub has."""
    good = state.compared - {*state.mismatched}
    here = {} if state.error else state.here
    return {name: spans for name, spans in here.items() if name not in doubted or name in good}


def _size(content: Mapping[str, Sequence[Span]]) -> int:
    return sum(num_bytes(spans) for spans in content.values())


def state_of(host: Host, ranks: list[int], needs: Needs) -> HostState:
    """Return a host before a sync: it needs what its ranks need."""
    spans = {name: merged(span for rank in ranks for span in needs.by_rank[rank].get(name, ())) for name in needs.heads}
    return HostState(host, ranks, {name: some for name, some in spans.items() if some})
