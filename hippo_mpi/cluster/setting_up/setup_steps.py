"""The steps of setup, once all hosts are reached and have said what they are. Each can be repeated."""

from __future__ import annotations

import platform
import secrets
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from hippo_mpi.cluster.cabling.topology import Topology
from hippo_mpi.cluster.setting_up import agent, fitting, packing
from hippo_mpi.cluster.setting_up.carrying_out import carry_out, lines_of
from hippo_mpi.cluster.setting_up.first_run import TOKENS, compare, start_alone
from hippo_mpi.cluster.setting_up.made_hostfile import MadeHostfile
from hippo_mpi.cluster.setting_up.reaching import Say, at_all
from hippo_mpi.cluster.setting_up.session import Session
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.transport.ports import THIS_MACHINE
from hippo_mpi.units import count_of, show_bytes

FOLDER = "~/.hippo-mpi"
PYTHON = f"{FOLDER}/venv/bin/python"
"""Of ranks on hosts that setup has made."""
_ROUND_TRIPS = 50
_COPY_S = 900.0
_PIP_S = 1900.0
_TELL_S = 5.0  # between two lines of how much is copied
_ROOM = 1.2  # of a copy on a disk, in parts of its bytes


@dataclass
class Cluster:
    """What is known of all hosts.

    Args:
        sessions: open, by name, this machine's first.
        said: what they have said of themselves.
        topology: how they are joined.
    """

    sessions: Mapping[str, Session]
    said: Mapping[str, fitting.There]
    topology: Topology

    @property
    def others(self) -> list[str]:
        """Return the hosts beside this machine."""
        return [name for name in self.sessions if name != THIS_MACHINE]


class Step(Protocol):
    """Something to be done, on some hosts or all."""

    name: str

    def describe(self) -> dict[str, list[str]]:
        """Return what would be changed, a line each, by host; nothing if all is done."""

    def do(self, say: Say) -> None:
        """Do what isn't done.

        Raises:
            HippoError: it fails; nothing is half done.
        """


@dataclass
class Addresses:
    """Addresses for cables."""

    cluster: Cluster
    name: str = "addresses"

    def describe(self) -> dict[str, list[str]]:
        """Return the commands."""
        return {host: lines_of(commands) for host, commands in self.cluster.topology.plan.commands.items()}

    def do(self, say: Say) -> None:
        """Run them, on one host after the other: sudo may ask."""
        for host, commands in self.cluster.topology.plan.commands.items():
            carry_out(self.cluster.sessions[host], commands, "setup")
            say(host, self.name, f"{count_of(len(commands), 'command')} run")


@dataclass
class Project:
    """This project's files."""

    cluster: Cluster
    name: str = "project"
    bundle: packing.Bundle = field(default_factory=packing.project)

    @cached_property
    def _missing(self) -> list[str]:
        return [
            host for host in self.cluster.others if self.cluster.said[host].links.get("project") != self.bundle.name
        ]

    @property
    def _what(self) -> str:
        return f"{count_of(len(self.bundle.files), 'file')}, {show_bytes(self.bundle.size)}"

    def needs(self, host: str) -> int:
        """Return the bytes that will be copied to a host."""
        return self.bundle.size if host in self._missing else 0

    def describe(self) -> dict[str, list[str]]:
        """Return what is copied."""
        return {host: [f"copy this project to {FOLDER}: {self._what}"] for host in self._missing}

    def do(self, say: Say) -> None:
        """Copy it."""
        _tell_done(self, self.cluster.others, self._missing, say)

        def one(host: str) -> None:
            began_s = time.monotonic()
            _send(self.cluster, host, self.bundle, "project", self.name, say)
            say(host, self.name, f"{self._what}, {time.monotonic() - began_s:.1f} s")

        at_all(self._missing, one)


@dataclass
class Environment:
    """The packages that ranks need."""

    cluster: Cluster
    name: str = "environment"

    def __post_init__(self) -> None:
        self._packages = packing.closure()
        self._bundle = packing.environment(self._packages)
        self._requirements = fitting.pinned()
        self._reasons: dict[str, str] = {}
        self._wanted: dict[str, str] = {}
        for host in self.cluster.others:
            there = self.cluster.said[host]
            fitting.check(host, there)
            reason = fitting.why_not(self._packages, there) if self._bundle else "some packages here are elsewhere"
            if reason:
                self._reasons[host] = reason
            by_pip = f"venv-{packing.digest_of(self._requirements)}"
            self._wanted[host] = by_pip if reason or not self._bundle else self._bundle.name

    @cached_property
    def _missing(self) -> list[str]:
        return [h for h in self.cluster.others if self.cluster.said[h].links.get("venv") != self._wanted[h]]

    def needs(self, host: str) -> int:
        """Return the bytes that will be on a host, as far as is known."""
        return self._bundle.size if self._bundle and host in self._missing else 0

    def describe(self) -> dict[str, list[str]]:
        """Return what is copied or installed."""
        return {host: [self._line(host)] for host in self._missing}

    def _line(self, host: str) -> str:
        if reason := self._reasons.get(host):
            return f"pip install {shlex.join(self._requirements)}, into {FOLDER}/venv (not copied: {reason})"
        assert self._bundle
        return f"copy {count_of(len(self._packages), 'package')} of this machine's Python to {FOLDER}/venv: {show_bytes(self._bundle.size)}"

    def do(self, say: Say) -> None:
        """Copy or install them."""
        _tell_done(self, self.cluster.others, self._missing, say)
        at_all(self._missing, lambda host: self._do(host, say))

    def _do(self, host: str, say: Say) -> None:
        began_s = time.monotonic()
        if host in self._reasons:
            say(host, self.name, "pip installs; this takes some minutes")
            self._install(host)
            how = "installed by pip"
        else:
            assert self._bundle
            _send(self.cluster, host, self._bundle, "venv", self.name, say)
            how = f"copied from here, {show_bytes(self._bundle.size)}"
        say(
            host,
            self.name,
            f"Python {self.cluster.said[host].version}; {how}, {time.monotonic() - began_s:.1f} s; imports",
        )

    def _install(self, host: str) -> None:
        try:
            self.cluster.sessions[host].call(
                agent.install, _PIP_S, name=self._wanted[host], link="venv", requirements=self._requirements
            )
        except LaunchError as error:
            if not self._reasons[host].startswith("Python"):
                raise
            own = platform.python_version().rpartition(".")[0]
            raise LaunchError(f"{error}; with Python {own} there, as here, packages would be copied instead") from None

    @property
    def mark(self) -> list[str]:
        """Return what tells the environments of all hosts from others."""
        return sorted(set(self._wanted.values()))


def check_room(cluster: Cluster, steps: Sequence[Project | Environment]) -> None:
    """Check that all hosts have room for what is to be copied.

    Raises:
        LaunchError: one hasn't.
    """
    for host in cluster.others:
        free, needed = cluster.said[host].free_bytes, int(_ROOM * sum(step.needs(host) for step in steps))
        if free < needed:
            raise LaunchError(
                f"{host} has {show_bytes(free)} free in its home folder, and {show_bytes(needed)} are needed: make room"
            )


def _tell_done(step: Step, hosts: Sequence[str], missing: Sequence[str], say: Say) -> None:
    for host in hosts:
        if host not in missing:
            say(host, step.name, "as here")


def _send(cluster: Cluster, host: str, bundle: packing.Bundle, link: str, step: str, say: Say) -> None:
    chunks = told(bundle, lambda what: say(host, step, what))
    cluster.sessions[host].send(
        agent.receive, chunks, _COPY_S, name=bundle.name, link=link, is_environment=link == "venv"
    )


def told(bundle: packing.Bundle, tell: Callable[[str], None]) -> Iterator[bytes]:
    """Yield what is to be sent, and tell how much of it has gone, every few seconds."""
    gone, told_s = 0, time.monotonic()
    for chunk in bundle.chunks():
        yield chunk
        gone += len(chunk)
        if time.monotonic() - told_s > _TELL_S:
            told_s = time.monotonic()
            tell(f"{show_bytes(min(gone, bundle.size))} of {show_bytes(bundle.size)} copied")


@dataclass
class Link:
    """A round trip to each rank's address, from the rank before it."""

    cluster: Cluster
    name: str = "link"

    def describe(self) -> dict[str, list[str]]:
        """Return nothing: it changes nothing."""
        return {}

    def do(self, say: Say) -> None:
        """Measure it."""
        hosts = self.cluster.topology.hostfile.hosts
        for rank, host in enumerate(hosts):
            before = hosts[rank - 1]
            for address in host.ips:
                trips = self._measure(before.ssh, host.ssh, address)
                say(host.ssh, self.name, f"{address} from {before.ssh}: {statistics.median(trips):.2f} ms")

    def _measure(self, before: str, host: str, address: str) -> list[float]:
        key = secrets.token_hex(16)
        fix = (
            "is the cable in, is the interface up on both ends, does a firewall drop it? ./launch/cluster doctor looks"
        )
        try:
            port = self.cluster.sessions[host].call(agent.listen, address=address, key=key)
        except LaunchError as error:
            raise LaunchError(f"nothing can listen on {address}: {error}; {fix}") from None
        try:
            found = self.cluster.sessions[before].call(
                agent.round_trips, address=address, port=port, key=key, count=_ROUND_TRIPS
            )
            return [float(one) for one in found]
        except (TypeError, ValueError):
            raise RankError(f"{before} gave an answer that can't be read") from None
        except LaunchError as error:
            raise LaunchError(f"{address} of {host} isn't reached: {error}; {fix}") from None


@dataclass
class FirstRun:
    """Some tokens from all ranks, and the hostfile after it.

    Args:
        marks: what the ranks consist of; in the hostfile they say that a run was made with it.
        is_anew: whether to run although the hostfile says so.
    """

    cluster: Cluster
    file: MadeHostfile
    marks: Sequence[str]
    is_anew: bool
    name: str = "first run"
    _alone: subprocess.Popen[bytes] | None = None

    @cached_property
    def _wanted(self) -> str:
        return self.file.wanted(self.cluster.topology.hostfile, self.marks, PYTHON)

    def describe(self) -> dict[str, list[str]]:
        """Return that the hostfile will be written, if it isn't yet after a run like this one."""
        return (
            {} if self.file.text == self._wanted and not self.is_anew else {THIS_MACHINE: [f"write {self.file.path}"]}
        )

    def start_alone(self) -> None:
        """Start on this machine alone, if there is something to compare with it later."""
        if self.describe():
            self._alone = start_alone()

    def do(self, say: Say) -> None:
        """Run, compare, and write the hostfile."""
        ranks = count_of(len(self.cluster.sessions), "rank")
        if not self.describe():
            say("", self.name, f"{ranks}: as they were")
            return
        say("", self.name, f"{ranks} start; up to a minute or two")
        began_s = time.monotonic()
        compare(self._alone, self._wanted)
        say(
            "",
            self.name,
            f"{ranks}, {TOKENS} tokens of the bundled model: the same as on one machine, {time.monotonic() - began_s:.1f} s",
        )
        self.file.write(self._wanted)
        say("", str(self.file.path), "written")

    def end(self) -> None:
        """End what was started."""
        if self._alone and self._alone.poll() is None:
            self._alone.kill()
            self._alone.communicate()
