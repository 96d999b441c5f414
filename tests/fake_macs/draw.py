"""Clusters of fake Macs, drawn; what the probe would bring back from them; and what mlx's own set-up makes of them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Interface
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

from hippo_mpi.cluster.asking import probe
from hippo_mpi.cluster.asking.facts import Probed, read_facts
from hippo_mpi.cluster.cabling.topology import Topology, topology_of
from hippo_mpi.cluster.hostfile import Host, Hostfile
from tests.fake_macs.model import GIB, FakeCable, FakeCluster, FakeMac

VERSIONS = {"Python": "3.12.1", "hippo-mpi": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"}
NOW_S = 1000.0


def names_of(count: int) -> list[str]:
    return ["127.0.0.1", *(f"mini{number}" for number in range(1, count))]


def some_macs(draw: random.Random, count: int, **settings: Any) -> list[FakeMac]:
    lan = f"192.168.{draw.randrange(256)}"
    return [
        FakeMac(f"mini{number}", draw.randrange(1000), lan=f"{lan}.{number + 10}/24", **settings)
        for number in range(count)
    ]


def random_graph(seed: int) -> FakeCluster:
    """Two to six Macs, with cables, docks, disks and double cables where there were ports for them."""
    draw = random.Random(seed)
    count = draw.randrange(2, 7)
    macs = some_macs(draw, count, thunderbolt=draw.choice([4, 5, 5]), rdma=draw.choice([True, True, False]))
    for mac in macs:
        mac.shows_idle_domains = draw.random() < 0.7
    cluster = FakeCluster(macs)
    has_docks = draw.random() < 0.3
    pairs = [pair for pair in combinations(range(count), 2) if draw.random() < draw.choice([0.5, 0.9, 1.0])]
    pairs += [pair for pair in pairs if draw.random() < 0.15]
    draw.shuffle(pairs)
    for one, other in pairs:
        connect(cluster, draw, *draw.sample([one, other], 2), has_docks)
    for place in [(mac, port) for mac in range(count) for port in range(1, 5)]:
        if draw.random() < 0.1 and cluster.cable_at(*place) is None:
            cluster.disks[place] = "Fast Disk"
    return cluster


def connect(cluster: FakeCluster, draw: random.Random, one: int, other: int, has_docks: bool = False) -> None:
    """Join two Macs, if both have a port left."""
    free = [
        [port.receptacle for port in cluster.macs[mac].ports if cluster.cable_at(mac, port.receptacle) is None]
        for mac in (one, other)
    ]
    if all(free):
        dock = "SB-XTM5" if has_docks and draw.random() < 0.3 else None
        ends = (one, draw.choice(free[0])), (other, draw.choice(free[1]))
        gbps = 80 if min(cluster.macs[mac].thunderbolt for mac in (one, other)) == 5 else 40
        cluster.cables.append(FakeCable(ends, gbps, dock, is_one_sided=bool(dock) and draw.random() < 0.5))


def raw(cluster: FakeCluster, mac: int, hosts: Sequence[Host]) -> dict[str, Any]:
    """What the probe would bring back from a Mac."""
    own = cluster.macs[mac]
    outputs: dict[str, dict[str, Any]] = {}
    for name, words in probe.COMMANDS["Darwin"].items():
        if name == "service settings":
            infos = [
                (one.name, cluster.answer(mac, ["networksetup", "-getinfo", one.name]).out) for one in own.services
            ]
            outputs[name] = output("".join(f"== {service}\n{info}" for service, info in infos))
        elif name == "processes":
            outputs[name] = output("    1     0 root 1-00:00:00 /sbin/launchd\n")
        else:
            answer = cluster.answer(mac, list(words))
            outputs[name] = {"out": answer.out, "err": answer.err, "status": answer.status}
    outputs["versions"] = output(json.dumps(VERSIONS))
    if own.python.startswith("/Users/anna/Documents/"):
        outputs["versions"] = {"out": "", "err": f"{own.python}: Operation not permitted", "status": 126}
    following = hosts[(mac + 1) % len(hosts)].ips if len(hosts) > 1 else ()
    mine = {str(one.ip) for one in all_addresses(cluster, mac)}
    return {
        "system": "Darwin", "release": "25.4.0", "name": own.name, "python": own.python, "home": "/Users/anna",
        "ranks_python": own.python, "shell": "/bin/zsh", "clock": NOW_S, "open_files": 1 << 20, "cache": "/Users/anna/.cache",
        "cache_free": 200 * GIB, "environment": {}, "taken": {}, "outputs": outputs,
        "own": {ip: "" if ip in mine else "Can't assign requested address" for ip in hosts[mac].ips},
        "reached": {ip: reach(cluster, mac, ip) for ip in following},
    }  # fmt: skip


def output(text: str, status: int = 0) -> dict[str, Any]:
    return {"out": text, "err": "", "status": status}


def reach(cluster: FakeCluster, mac: int, address: str) -> dict[str, Any]:
    """Of an address: it is there if some Mac has it, and the interface is in its network."""
    route = cluster.answer(mac, ["route", "-n", "get", address]).out
    interface = route.split("interface: ")[1].split()[0]
    source = next((str(one.ip) for one in cluster.addresses(mac, interface)), None)
    here = {str(one.ip): other for number, other in enumerate(cluster.macs) for one in all_addresses(cluster, number)}
    found = {"source": source, "why": "", "number": 0, "seconds": 0.01, "route": output(route)}
    if address not in here or here[address].drops_packets:
        return found | {"why": "timed out", "seconds": 2.0}
    if cluster.macs[mac].is_python_denied:
        return found | {"why": "No route to host", "number": errno.EHOSTUNREACH, "nc": output("")}
    return found


def all_addresses(cluster: FakeCluster, mac: int) -> list[IPv4Interface]:
    return [one for _, name in cluster.macs[mac].hardware_ports for one in cluster.addresses(mac, name)]


def ask(cluster: FakeCluster, hostfile: Hostfile | None = None) -> list[Probed]:
    """What asking all Macs brings; each has the number of its place in `names_of`."""
    hosts = hostfile.hosts if hostfile else tuple(Host(name) for name in names_of(len(cluster.macs)))
    places = [names_of(len(cluster.macs)).index(host.ssh) for host in hosts]
    backend = hostfile.backend if hostfile else None
    ordered = FakeCluster(*reordered(cluster, places))
    raws = [raw(ordered, number, hosts) for number in range(len(hosts))]
    return [
        Probed(host, read_facts(one), asked_s=NOW_S, raw=one, backend=backend)
        for host, one in zip(hosts, raws, strict=True)
    ]


def reordered(
    cluster: FakeCluster, places: Sequence[int]
) -> tuple[list[FakeMac], list[FakeCable], dict[tuple[int, int], str]]:
    """The same Macs, by rank."""
    rank_of = {place: rank for rank, place in enumerate(places)}

    def renumbered(end: tuple[int, int]) -> tuple[int, int]:
        return rank_of[end[0]], end[1]

    cables = [replace(one, ends=(renumbered(one.ends[0]), renumbered(one.ends[1]))) for one in cluster.cables]
    return [cluster.macs[place] for place in places], cables, {renumbered(k): v for k, v in cluster.disks.items()}


def apply(cluster: FakeCluster, topology: Topology, undo: bool = False) -> None:
    """Run the commands of a plan, or those that undo it."""
    for name, commands in topology.plan.commands.items():
        mac = names_of(len(cluster.macs)).index(name)
        for command in reversed(commands) if undo else commands:
            answer = cluster.answer(mac, list(command.undo if undo else command.do))
            assert answer.status == 0 and not answer.err, (command, answer)


def healthy(seed: int) -> tuple[FakeCluster, Hostfile]:
    """Macs in a ring, a mesh or only a LAN, set up as the plan says, and their hostfile."""
    draw = random.Random(seed)
    count = draw.randrange(1, 6)
    thunderbolt = draw.choice([4, 5])
    chip, title = draw.choice(
        [("Apple M4 Max", "Mac Studio"), ("Apple M4 Pro", "Mac mini")]
        if thunderbolt == 5
        else [("Apple M2 Ultra", "Mac Studio"), ("Apple M4", "Mac mini")]
    )
    cluster = FakeCluster(
        some_macs(
            draw, count, thunderbolt=thunderbolt, chip=chip, title=title, rdma=thunderbolt == 5 and draw.random() < 0.5
        )
    )
    for number, mac in enumerate(cluster.macs):
        if draw.random() < 0.3:  # in the same LAN once more
            mac.wifi = f"{mac.lan.rpartition('.')[0]}.{number + 100}/24"
    shape = draw.choice(["ring", "mesh", "LAN"])
    near = {(number, (number + 1) % count) for number in range(count if count > 2 else count - 1)}
    for one, other in {"ring": sorted(near), "mesh": list(combinations(range(count), 2)), "LAN": []}[shape]:
        connect(cluster, draw, one, other)
    topology = topology_of(ask(cluster))
    apply(cluster, topology)
    return cluster, topology.hostfile


def ask_mlx(cluster: FakeCluster, folder: Path) -> dict[str, Any] | None:
    """The hostfile that mlx's own set-up writes for these Macs; None: it finds none, or fails."""
    from mlx._distributed_utils import config
    from mlx._distributed_utils.common import Host as MlxHost

    names = names_of(len(cluster.macs))

    def run(words: list[str], **_: Any) -> Any:
        answer = cluster.answer(names.index(words[1]), words[2:])
        is_text = words[2] not in ("system_profiler", "networksetup")
        return argparse.Namespace(stdout=answer.out if is_text else answer.out.encode())

    given = argparse.Namespace(
        verbose=False, dot=False, backend=None, env=[], auto_setup=False, output_hostfile=str(folder / "mlx.json")
    )
    hosts = [MlxHost(rank, name, [], []) for rank, name in enumerate(names)]
    with (
        mock.patch.multiple(config, run=run, log_error=mock.Mock(), log_warning=mock.Mock()),
        mock.patch.object(config.IPConfigurator, "setup"),
        contextlib.suppress(SystemExit, KeyError, IndexError, ValueError),
    ):
        config.prepare_tb_hostfile(given, hosts, [config.SSHInfo(True, False)] * len(hosts))
        found: dict[str, Any] = json.loads((folder / "mlx.json").read_text())
        return found
    return None
