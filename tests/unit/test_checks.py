"""The doctor's judgement, which is pure: random clusters that are well have no faults, and odd answers end nothing."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hippo_mpi.cluster.asking import remote
from hippo_mpi.cluster.asking.facts import Facts, Interface, Probed, Process, Reach, read_facts
from hippo_mpi.cluster.doctor.checks import NAMES, diagnose
from hippo_mpi.cluster.doctor.doctor import exit_code, lines_of, read_saved, save, to_json
from hippo_mpi.cluster.hostfile import Host
from hippo_mpi.cluster.link.link import addresses_of
from hippo_mpi.cluster.link.link_kinds import kinds_of
from hippo_mpi.cluster.top import top
from hippo_mpi.errors import UserError
from tests.fake_macs import draw

VERSIONS: dict[str, str | None] = {"Python": "3.12.1", "hippo-mpi": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"}
GIB = 1 << 30


def healthy(seed: int) -> list[Probed]:
    """Hosts in a ring: each cable a network of its own, beside a LAN, or only the LAN; Linux or macOS."""
    draw = random.Random(seed)
    size, has_cables = draw.randrange(1, 7), draw.random() < 0.7
    lan = f"192.168.{draw.randrange(256)}"

    def on_cable(rank: int) -> str:
        """Of a rank, on its cable to the one before."""
        return f"10.205.{rank}.1" if has_cables else f"{lan}.{rank + 10}"

    hosts = []
    for rank in range(size):
        following = (rank + 1) % size
        interfaces = [Interface("lo", (IPv4Interface("127.0.0.1/8"),), 65536)]
        interfaces.append(Interface("en0", (IPv4Interface(f"{lan}.{rank + 10}/24"),), 1500))
        if has_cables and size > 1:
            interfaces.append(Interface("en3", (IPv4Interface(f"10.205.{rank}.1/30"),), 9000))
            interfaces.append(Interface("en4", (IPv4Interface(f"10.205.{following}.2/30"),), 9000))
        source = f"10.205.{following}.2" if has_cables else f"{lan}.{rank + 10}"
        host = Host("127.0.0.1" if rank == 0 else f"mini{rank}", (on_cable(rank),) if size > 1 else ())
        facts = Facts(
            draw.choice(["Linux", "Darwin"]), "6.1", f"mini{rank}", draw.choice(["/bin/bash", "/bin/zsh"]), 1000.0 + draw.uniform(-1, 1),
            draw.choice([1024, 1 << 20, -1]), "/home/anna/.cache", draw.randrange(3, 900) * GIB, dict(VERSIONS), "", {},
            {address: "" for address in host.ips}, {on_cable(following): Reach(source, "")} if size > 1 else {}, {},
            tuple(interfaces), (64 * GIB, 50 * GIB), (Process(7, 6, "anna", "python -m hippo_mpi.generate"), Process(8, 1, "anna", "python -m hippo_mpi.serve")),
            draw.choice(["/sbin/init splash", "/sbin/launchd", "/usr/lib/systemd/systemd"]), f"{rank:032x}",
        )  # fmt: skip
        hosts.append(Probed(host, facts, asked_s=1000.0))
    return hosts


@pytest.mark.parametrize("seed", range(200))
def test_random_clusters_that_are_well(seed: int) -> None:
    hosts = healthy(seed)
    assert diagnose(hosts) == [] and exit_code(hosts, []) == 0
    assert list(lines_of(hosts, []))[-1] == "nothing is wrong"


def change(hosts: list[Probed], rank: int, **fields: Any) -> list[Probed]:
    facts = hosts[rank].facts
    assert facts is not None
    return [*hosts[:rank], replace(hosts[rank], facts=replace(facts, **fields)), *hosts[rank + 1 :]]


FIELDS: dict[str, dict[str, Any]] = {
    "stale-ranks": {"processes": (Process(7, 1, "anna", "python -m hippo_mpi.generate"),)},
    "memory-taken": {"memory": (64 * GIB, 3 * GIB)},
    "clock": {"clock": 1400.0},
    "python-missing": {"versions": {"Python": "3.12.1", "hippo-mpi": None, "mlx": None, "mlx-lm": None}},
    "path-differs": {"versions": {}, "versions_error": "No such file or directory"},
    "disk-full": {"cache_free": 1 << 20},
    "open-files": {"open_files": 256},
    "port-taken": {"taken": {17000: "Address already in use"}},
}


@pytest.mark.parametrize("check", FIELDS)
def test_what_is_wrong_is_named_on_its_host(check: str) -> None:
    hosts = change(healthy(3), 1, **FIELDS[check])
    (finding,) = diagnose(hosts)
    assert (finding.check, finding.host) == (check, "mini1") and finding.found and finding.fix
    assert check in NAMES
    assert diagnose(hosts, ["ssh-noise"]) == []


@pytest.mark.parametrize("first", ["", "sh -c run", "/bin/bash", "python3.12 -m x"])
def test_a_container_s_own_ranks_are_watched(first: str) -> None:
    assert diagnose(change(healthy(3), 1, first_process=first, **FIELDS["stale-ranks"])) == []


def test_a_slow_answer_is_no_clock_that_is_off() -> None:
    hosts = change(healthy(3), 1, clock=1040.0)
    assert [one.check for one in diagnose(hosts)] == ["clock"]
    hosts[1] = replace(hosts[1], took_s=41.0)
    assert diagnose(hosts) == []
    assert [one.found for one in diagnose(change(hosts, 1, clock=940.0))] == ["its clock is -60 s off"]


def test_this_machine_is_not_said_to_refuse_ssh() -> None:
    """A busy one that says nothing in time: nothing of what is done about ssh helps, and no run has failed by it."""
    hosts = [replace(one, facts=None, error="no answer within 10 s") for one in healthy(3)[:2]]
    here, other = diagnose(hosts)[::-1]
    assert (here.check, here.host, here.weight) == ("no-answer", "127.0.0.1", "warning") and "ssh" not in here.fix
    assert (other.check, other.host, other.weight) == ("ssh-refused", "mini1", "error")
    assert here.check in NAMES and exit_code(hosts[:1], []) == 3


def test_a_machine_that_went_down_has_no_firewall() -> None:
    """Linux goes on to call its neighbor reachable for half a minute."""
    hosts = healthy(3)
    facts = hosts[0].facts
    assert facts is not None
    hosts = change(
        hosts,
        0,
        reached={where: replace(one, why="timed out", is_on_link=True) for where, one in facts.reached.items()},
    )
    assert ("firewall", hosts[1].host.ssh) in {(one.check, one.host) for one in diagnose(hosts)}
    hosts[1] = replace(hosts[1], facts=None, error="ssh: connect to host mini1 port 22: Connection timed out")
    found = {one.check for one in diagnose(hosts)}
    assert "ssh-refused" in found and "firewall" not in found


def test_one_machine_under_two_names() -> None:
    hosts = next(hosts for hosts in map(healthy, range(100)) if len(hosts) > 2)
    facts = hosts[1].facts
    assert facts is not None
    (finding,) = diagnose(change(hosts, 2, machine=facts.machine, name=facts.name))
    assert finding.check == "names-same" and "mini1 and mini2 are one machine" in finding.found


def raw() -> dict[str, Any]:
    def output(text: str, status: int | None = 0) -> dict[str, Any]:
        return {"out": text, "err": "", "status": status}

    return {
        "system": "Darwin", "release": "25.4.0", "name": "mini2", "python": "/usr/bin/python3", "home": "/Users/anna",
        "shell": "/bin/zsh", "clock": 1000.0, "open_files": 256, "cache": "/Users/anna/.cache", "cache_free": 5 * GIB,
        "environment": {}, "own": {}, "taken": {}, "reached": {},
        "outputs": {
            "addresses": output(IFCONFIG), "memory": output(""), "processes": output(""), "versions": output(json.dumps(VERSIONS)),
        },
    }  # fmt: skip


IFCONFIG = """lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether aa:bb:cc:dd:ee:01
\tinet 192.168.1.12 netmask 0xffffff00 broadcast 192.168.1.255
\tstatus: active
en3: flags=8822<BROADCAST,SMART,SIMPLEX,MULTICAST> mtu 9000
\tinet 10.205.0.2 netmask 0xfffffffc broadcast 10.205.0.3
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tmember: en3 flags=3<LEARNING,DISCOVER>
"""


def test_interfaces_of_macos() -> None:
    facts = read_facts(raw())
    assert facts.interfaces == (
        Interface("lo0", (IPv4Interface("127.0.0.1/8"),), 16384),
        Interface("en0", (IPv4Interface("192.168.1.12/24"),), 1500),
        Interface("bridge0", (), 1500),
    )


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[1]", '[{"ifname": 1}]', "\x00\xff", "inet inet inet"])
def test_what_can_not_be_read_is_unknown(system: str, text: str) -> None:
    answer = {**raw(), "system": system}
    for name in ("addresses", "memory", "processes", "machine"):
        answer["outputs"][name] = {"out": text, "err": "", "status": 0}
    hosts = [Probed(Host("mini2"), read_facts(answer), asked_s=1000.0)]
    assert not [one for one in diagnose(hosts) if one.weight == "error"]
    assert list(lines_of(hosts, []))


def test_addresses_of_six_are_none_that_a_ring_has() -> None:
    hosts = change(
        healthy(3), 1, own={"fe80::1": "Address family not supported"}, reached={"fe80::2": Reach(None, "no")}
    )
    assert {one.check for one in diagnose(hosts)} == {"address-missing", "link-down"}


def test_numbers_with_many_digits_are_no_ids(tmp_path: Path) -> None:
    answer = {**raw(), "clock": 1000.1234567890123456}
    answer["outputs"]["addresses"]["out"] += "0123456789abcdef 0x0123456789ABCDEF"
    hosts = [
        Probed(Host("mini2"), read_facts(answer), asked_s=0.1234567890123456, took_s=2.2345678901234567e-05, raw=answer)
    ]
    save(hosts, tmp_path / "report.json")
    (again,) = read_saved(tmp_path / "report.json")
    assert (again.asked_s, again.took_s) == (hosts[0].asked_s, hosts[0].took_s)
    assert "89abcdef" not in (tmp_path / "report.json").read_text().lower()


ADDRESSES = [
    {"ifname": "lo", "flags": ["UP"], "mtu": 65536, "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8}]},
    {"ifname": "eth0", "flags": ["UP"], "mtu": 1500, "addr_info": [{"family": "inet", "local": "10.0.0.1", "prefixlen": 24}]},
    {"ifname": "br0", "flags": ["UP"], "mtu": 1500, "addr_info": [], "linkinfo": {"info_kind": "bridge", "info_data": {"stp_state": 0}}},
    {"ifname": "eth1", "flags": ["UP", "LOWER_UP"], "master": "br0", "mtu": 1500, "addr_info": []},
]  # fmt: skip
LINUX = {
    "addresses": ADDRESSES, "links": ADDRESSES, "routes": [{"dst": "default"}, {"dst": "10.0.0.0/24"}],
    "memory": "MemTotal: 64000000 kB\nMemAvailable: 1000000 kB\n", "footprints": "  1000  7 python\n", "machine": "0ab\n",
    "processes": "1 0 root 1-00 /sbin/init\n7 1 anna 1-00 python -m hippo_mpi.generate\n", "governor": "acpi\npowersave\n",
    "firewall services": "active\n", "hub": "404\n", "mpi": "mpirun (Open MPI) 5.0\n", "versions": VERSIONS,
    "settings": "hw.memsize: 68719476736\niogpu.wired_limit_mb: 60000\n",
}  # fmt: skip
ODD = (
    None,
    -1,
    0,
    1e400,
    float("nan"),
    10**30,
    10**400,
    "",
    " ",
    "x",
    "²",
    "9" * 400,
    "[" * 100_000,
    [],
    {},
    [None],
    {"a": 1},
    True,
    "\x1b[31m",
    [[["x"]]],
)


def linux() -> dict[str, Any]:
    outputs = {
        name: {"out": text if isinstance(text, str) else json.dumps(text), "err": "", "status": 0}
        for name, text in LINUX.items()
    }
    reached = {"10.0.0.2": {"source": "10.0.0.1", "why": "timed out", "seconds": 2.0, "neighbor": outputs["hub"]}}
    facts = {"own": {"10.0.0.1": ""}, "reached": reached, "taken": {"17000": "Address already in use"}}
    environment = {"SSH_CONNECTION": "10.0.0.9 1 10.0.0.1 22"}
    model = {"size": 5 << 40, "here": 0}
    return {**raw(), **facts, "system": "Linux", "outputs": outputs, "environment": environment, "model": model}


def mac() -> dict[str, Any]:
    return draw.raw(draw.random_graph(3), 0, [Host("a", ("10.205.0.1",)), Host("b", ("10.205.0.2",))])


def mutated(value: Any, chosen: random.Random) -> Any:
    """A value of JSON, also of JSON in texts, somewhere in which something else stands."""
    inner = None
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        inner = json.loads(value)
    if isinstance(inner, list | dict):
        return json.dumps(mutated(inner, chosen))
    if not isinstance(value, list | dict) or not value or chosen.random() < 0.1:
        if isinstance(value, str) and chosen.random() < 0.5:
            return re.sub(r"\d+", lambda found: chosen.choice([found[0], "9" * 400, "9" * 5000, "²", "0"]), value)
        return chosen.choice(ODD)
    key = chosen.choice(range(len(value)) if isinstance(value, list) else list(value))
    changed = mutated(value[key], chosen)
    if isinstance(value, list):
        return [*value[:key], changed, *value[key + 1 :]]
    return {**value, key: changed}


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([linux, mac]), st.randoms(use_true_random=False), st.integers(1, 3))
def test_whatever_a_host_says_of_itself_is_judged_or_gets_a_line(
    made: Callable[[], dict[str, Any]], chosen: random.Random, count: int
) -> None:
    answer: Any = made()
    for _ in range(count):
        answer = mutated(answer, chosen)
    said = f"{remote._MARK}\n{json.dumps(answer)}"
    host = Host("a", ("10.0.0.1", "10.205.0.1"))
    one = remote._read(host, subprocess.CompletedProcess([], 0, said, ""), 1000.0)
    assert one.facts or "an answer that can't be read" in one.error
    sound = Probed(Host("127.0.0.1", ("10.0.0.2", "10.205.0.2")), read_facts(linux()), asked_s=1000.0, raw=linux())
    hosts = [replace(one, backend="mpi", model="a/b"), sound]
    findings = diagnose(hosts)
    assert all(line.isprintable() for line in lines_of(hosts, findings)) and to_json(hosts, findings)
    assert kinds_of(one, {}) is not None and isinstance(addresses_of([Probed(Host("a"), one.facts), sound], 0), tuple)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([linux, mac]), st.randoms(use_true_random=False))
def test_whatever_a_report_says_is_judged_or_refused(made: Callable[[], dict[str, Any]], chosen: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        save([Probed(Host("a", ("10.0.0.1",)), read_facts(made()), asked_s=1000.0, raw=made(), envs=("A=1",))], path)
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), chosen)))
        try:
            hosts = read_saved(path)
        except UserError as error:
            assert "is not what --save writes" in str(error)
            return
        findings = diagnose(hosts)
        assert list(lines_of(hosts, findings)) and to_json(hosts, findings)


def test_a_host_that_answers_in_endless_brackets_gets_a_line() -> None:
    said = subprocess.CompletedProcess([], 0, f"{remote._MARK}\n{'[' * 100_000}", "")
    one = remote._read(Host("mini2"), said, 1000.0)
    assert one.facts is None and "an answer that can't be read: RecursionError" in one.error
    assert top.data_interfaces([one], 0) == ()


NO_FACTS = json.dumps(
    [{"host": {"ssh": "a", "ips": [], "rdma": [], "python": None}, "error": "", "noise": "", "asked_s": 0.0, "raw": {**raw(), "reached": []}}]
)  # fmt: skip


@pytest.mark.parametrize("content", ["", "{}", "[]", "[1]", '[{"host": {}}]', NO_FACTS, "[" * 100_000])
def test_what_is_no_report(content: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is not what --save writes"):
        read_saved(path)
