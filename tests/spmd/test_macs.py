"""The doctor over ssh on fake Macs: from their commands, by way of the probe, to what people read; and commands that change them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hippo_mpi.cluster.cabling.topology import topology_of
from hippo_mpi.cluster.hostfile import Hostfile, hostfile_of
from hippo_mpi.cluster.programs import find_python
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT
from tests.fake_macs.draw import apply
from tests.fake_macs.hosts import MacHosts, mac_hosts
from tests.fake_macs.model import GIB, FakeCluster

pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(600),
]
TRIANGLE = [(0, 1), (1, 2), (2, 0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MacHosts, FakeCluster]]:
    with mac_hosts(tmp_path_factory.mktemp("macs"), 3, TRIANGLE) as hosts:
        yield hosts, hosts.macs.load()


@pytest.fixture
def three(made: tuple[MacHosts, FakeCluster]) -> Iterator[MacHosts]:
    """Three Macs that are well, in a ring of cables."""
    hosts, well = made
    entries = [
        {"ssh": host.name if host.number else "127.0.0.1", "ips": [host.cables[(host.number - 1) % 3]]}
        for host in hosts.hosts
    ]
    (hosts.folder / "hosts.json").write_text(json.dumps({"backend": "ring", "hosts": entries}))
    hosts.macs.store(copy.deepcopy(well))
    yield hosts


def doctor(three: MacHosts, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and what is said; of processes nothing, since all of the machine's are on each host here."""
    command = [sys.executable, "-m", "hippo_mpi.cluster", "doctor", "--json", "--timeout", "200", *options]
    given = [*command, "--hostfile", str(three.folder / "hosts.json")]
    found = run(three, given)
    assert found.returncode in (0, 2, 3), found.stderr
    said = json.loads(found.stdout)
    said["findings"] = [one for one in said["findings"] if one["check"] not in ("stale-ranks", "memory-taken")]
    return found.returncode, said


def run(three: MacHosts, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        three.hosts[0].command(words), capture_output=True, text=True, timeout=300, env={**os.environ, **three.env}
    )


def test_nothing_is_wrong_with_macs_that_are_well(three: MacHosts) -> None:
    code, said = doctor(three, "--save", str(three.folder / "report.json"))
    assert code == 0 and {(one["check"], one["weight"]) for one in said["findings"]} == {("rdma-off", "info")}, said
    assert all(host["memory"][0] == 64 * GIB for host in said["hosts"])
    report = json.loads((three.folder / "report.json").read_text())
    for host in report:
        assert host["raw"]["system"] == "Darwin"
        failed = {name for name, one in host["raw"]["outputs"].items() if one["status"] != 0}
        assert failed == {"rdma at boot", "exo"}, {name: host["raw"]["outputs"][name] for name in failed}
    text = (three.folder / "report.json").read_text()
    assert not [port for mac in three.macs.load().macs for port in mac.ports if port.domain in text]
    again = run(
        three,
        [sys.executable, "-m", "hippo_mpi.cluster", "doctor", "--json", "--from", str(three.folder / "report.json")],
    )
    assert [one for one in json.loads(again.stdout)["findings"] if one["check"] != "stale-ranks"] == said["findings"]


def test_faults_are_named_on_their_hosts(three: MacHosts) -> None:
    """Several at once, on three hosts."""
    with three.macs.changed() as cluster:
        by = cluster.macs[1]
        following = cluster.macs[2].service_on(cluster.macs[2].port(1).interface)
        assert following
        by.routes[following.words[0]] = "en1"
        by.sleep, by.rdma = 10, True
        cluster.macs[2].has_exo, cluster.macs[2].wired = True, 40 * GIB
        del cluster.cables[2]
    code, said = doctor(three)
    errors = [(one["check"], one["host"]) for one in said["findings"] if one["weight"] == "error"]
    warnings = [(one["check"], one["host"]) for one in said["findings"] if one["weight"] == "warning"]
    assert code == 2 and errors[:2] == [("cable-absent", "mini2"), ("wrong-interface", "mini1")], said["findings"]
    assert warnings == [
        ("rdma-off", "127.0.0.1"), ("rdma-off", "mini2"), ("other-daemon", "mini2"), ("wired-stranded", "mini2"), ("sleeps", "mini1"),
    ]  # fmt: skip
    found = said["findings"][1]["found"]
    assert "leave by en1 (Wi-Fi), and not by en" in found and "(Thunderbolt 2)" in found


def test_python_that_may_not_use_the_local_network(three: MacHosts) -> None:
    """Its connect fails at once as on a Mac, while nc gets through."""
    address = three.hosts[1].cables[0]
    namespace = three.hosts[0].namespace
    subprocess.run(["ip", "-n", namespace, "route", "add", "unreachable", f"{address}/32"], check=True)
    try:
        code, said = doctor(three)
    finally:
        subprocess.run(["ip", "-n", namespace, "route", "del", "unreachable", f"{address}/32"], check=True)
    assert code == 2 and said["findings"][0]["check"] == "local-network-privacy", said["findings"]
    assert [one["check"] for one in said["findings"] if one["weight"] == "error"] == ["local-network-privacy"]


def test_a_plan_s_commands_change_what_is_found_next(three: MacHosts) -> None:
    """From ports in the bridge, without addresses, to a ring: by ssh, with the very words of the plan."""
    with three.macs.changed() as cluster:
        for mac in cluster.macs:
            mac.members = sorted(port.interface for port in mac.ports)
            mac.services = mac.services[:3]
    before = three.macs.load()
    hostfile = hostfile_of([{"ssh": name} for name in ("127.0.0.1", "mini1", "mini2")], "test")
    topology = topology_of(ask(three, hostfile))
    assert topology.plan.commands.keys() == {"127.0.0.1", "mini1", "mini2"}
    for name, commands in topology.plan.commands.items():
        script = " && ".join(shlex.join(command.do) for command in commands)
        done = run(three, ["sh", "-c", script] if name == "127.0.0.1" else ["ssh", name, script])
        assert done.returncode == 0, done
    again = topology_of(ask(three, hostfile))
    assert not again.plan.commands and again.hostfile == topology.hostfile
    assert topology.hostfile.backend == "ring" and all(
        host.ips[0].startswith("10.205.0.") for host in topology.hostfile.hosts
    )
    with three.macs.changed() as cluster:
        apply(cluster, topology, undo=True)
    assert three.macs.load() == before


def ask(three: MacHosts, hostfile: Hostfile) -> Any:
    """What asking brings, on host 0."""
    saved = three.folder / "asked.json"
    path = three.folder / "asked-hosts.json"
    path.write_text(hostfile.to_json())
    script = (
        "import pickle, sys; from pathlib import Path; from hippo_mpi.cluster.hostfile import read_hostfile;"
        "from hippo_mpi.cluster.asking.remote import ask;"
        f"Path({str(saved)!r}).write_bytes(pickle.dumps(ask(read_hostfile(Path({str(path)!r})), (), 200)))"
    )
    found = run(three, [sys.executable, "-c", script])
    assert found.returncode == 0, found.stderr
    return pickle.loads(saved.read_bytes())


@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="needs a python3 in /usr/bin")
def test_a_python_that_only_opens_a_window_is_not_started(three: MacHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS's own python3, without the command line tools: there is no xcode-select here."""
    monkeypatch.setattr(find_python, "_PYTHONS", ("python3",))
    script = find_python.script_of('exec "$python" -c \'print("asked")\'', "/no/such/python")
    path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    found = subprocess.run(three.hosts[0].command(["env", path, "sh", "-c", script]), capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == find_python.NO_PYTHON, found
    plain = subprocess.run(["env", path, "sh", "-c", script], capture_output=True, text=True)
    assert plain.stdout.splitlines()[-1] == "asked", plain
