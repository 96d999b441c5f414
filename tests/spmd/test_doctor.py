"""The doctor, over ssh between namespaces: what is broken there is named, on the right host, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT, Host, rated
from tests.small_disk import fill, small_disk
from tests.spmd.test_starter import Cluster, cluster

pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(120),
]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def doctor(three: Cluster, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and what is said, as JSON; of processes nothing, since all of the machine's are on each host here."""
    command = [
        sys.executable,
        "-m",
        "hippo_mpi.cluster",
        "doctor",
        "--timeout",
        "40",  # on a busy machine
        "--hostfile",
        str(three.hostfile),
        "--json",
        *options,
    ]
    found = subprocess.run(
        three.hosts[0].command(command), capture_output=True, text=True, timeout=60, env={**os.environ, **three.env}
    )
    assert found.returncode in (0, 2, 3), found.stderr
    said = json.loads(found.stdout)
    said["findings"] = [one for one in said["findings"] if one["check"] != "stale-ranks"]
    return found.returncode, said


def ip(host: Host, *words: str) -> None:
    subprocess.run(["ip", "-n", host.namespace, *words], check=True, capture_output=True)


def device(host: Host, address: str) -> str:
    shown = subprocess.run(
        ["ip", "-n", host.namespace, "-j", "addr", "show", "to", address], check=True, capture_output=True
    ).stdout
    return str(next(one["ifname"] for one in json.loads(shown) if one))


def rewrite(three: Cluster, change: Callable[[list[dict[str, Any]]], None]) -> None:
    content = json.loads(three.hostfile.read_text())
    change(content["hosts"])
    three.hostfile.write_text(json.dumps(content))


# ---- faults, each of a host; "" as host: of every host that ssh reaches


def no_sshd(three: Cluster, number: int) -> None:
    own = f"ListenAddress={three.hosts[number].lan}".encode()
    folder = str(three.hostfile.parent).encode()  # other tests have hosts of the same addresses
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdigit() and all(one in (path / "cmdline").read_bytes() for one in (own, folder)):
                os.kill(int(path.name), signal.SIGKILL)


def other_host_key(three: Cluster, number: int) -> None:
    folder = three.hostfile.parent
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "other"], check=True)
    kind, key, *_ = (folder / "other.pub").read_text().split()
    host = three.hosts[number]
    (folder / "known").write_text(f"{host.lan} {kind} {key}\n")
    strict = f"Host {host.name}\n StrictHostKeyChecking yes\n UserKnownHostsFile {folder / 'known'}\n"
    (folder / "config").write_text(strict + (folder / "config").read_text())


def unknown_name(three: Cluster, number: int) -> None:
    rewrite(three, lambda hosts: hosts[number].update(ssh=f"nosuch{number}.invalid"))


def no_python(three: Cluster, number: int) -> None:
    rewrite(three, lambda hosts: hosts[number].update(python="/no/such/python"))


def other_version(three: Cluster, number: int) -> None:
    folder = three.hostfile.parent / "other"
    (folder / "mlx-0.99.0.dist-info").mkdir(parents=True)
    (folder / "mlx-0.99.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx\nVersion: 0.99.0\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    rewrite(three, lambda hosts: hosts[number].update(python=str(python)))


def no_address(three: Cluster, number: int) -> None:
    host = three.hosts[number]
    address = host.cables[(number - 1) % 3]
    ip(host, "addr", "del", f"{address}/30", "dev", device(host, address))


def clash(three: Cluster, number: int) -> None:
    host = three.hosts[number]
    address = host.cables[(number - 1) % 3]
    ip(host, "addr", "add", f"{address.rpartition('.')[0]}.77/24", "dev", device(host, host.lan))


def by_the_lan(three: Cluster, number: int) -> None:
    host, other = three.hosts[number], three.hosts[(number + 1) % 3]
    ip(host, "route", "add", f"{other.cables[number]}/32", "dev", device(host, host.lan))


def cable_out(three: Cluster, number: int) -> None:
    other = three.hosts[(number + 1) % 3]
    ip(other, "link", "set", device(other, other.cables[number]), "down")


def small_mtu(three: Cluster, number: int) -> None:
    host = three.hosts[number]
    ip(host, "link", "set", device(host, host.cables[(number + 1) % 3]), "mtu", "1400")


def self_assigned(three: Cluster, number: int) -> None:
    move(three, number, "169.254.7")


def of_a_vpn(three: Cluster, number: int) -> None:
    move(three, number, "100.64.7")


def move(three: Cluster, number: int, network: str) -> None:
    """The cable to the host before gets other addresses."""
    host, before = three.hosts[number], three.hosts[(number - 1) % 3]
    for one, other, last in ((host, before, 1), (before, host, 2)):
        ip(one, "addr", "add", f"{network}.{last}/30", "dev", device(one, one.cables[other.number]))
    rewrite(three, lambda hosts: hosts[number].update(ips=[f"{network}.1"]))


def before_of(three: Cluster, number: int) -> str:
    """The address from which the host before calls."""
    return three.hosts[(number - 1) % 3].cables[number]


def nft(host: Host, rules: str) -> None:
    into = ["nsenter", f"--net=/run/netns/{host.namespace}", "nft", "-f", "-"]
    subprocess.run(into, input=rules, check=True, capture_output=True, text=True)


def firewall(three: Cluster, number: int) -> None:
    rules = f"table inet f {{ chain in {{ type filter hook input priority 0; ip saddr {before_of(three, number)} drop; }}; }}"
    nft(three.hosts[number], rules)


def refusing_firewall(three: Cluster, number: int) -> None:
    """A port where nobody listens is refused as without it."""
    rules = (
        f"table inet f {{ chain in {{ type filter hook input priority 0; ip saddr {before_of(three, number)} tcp dport != 9"
        " reject with tcp reset; }; }"
    )
    nft(three.hosts[number], rules)


def dropped(three: Cluster, number: int) -> None:
    """What nobody can look up: the host before gets no answers, though its cable is well."""
    ip(three.hosts[number], "route", "add", "blackhole", f"{before_of(three, number)}/32")


@dataclass(frozen=True)
class Case:
    """A fault, and whether its fix is a command that this system can run."""

    check: str
    befall: Callable[[Cluster, int], None]
    hosts: tuple[int, ...] = (1, 2)
    has_cure: bool = False


FAULTS = {
    "no sshd": Case("ssh-refused", no_sshd),
    "another host key": Case("ssh-host-key", other_host_key),
    "a name that nobody has": Case("ssh-refused", unknown_name),
    "no such Python": Case("path-differs", no_python),
    "another version": Case("versions-differ", other_version),
    "an address is gone": Case("address-missing", no_address, (0, 1, 2), has_cure=True),
    "two networks overlap": Case("address-clash", clash, (0, 1, 2), has_cure=True),
    "packets leave by the LAN": Case("wrong-interface", by_the_lan, (0, 1, 2), has_cure=True),
    "a cable is out": Case("link-down", cable_out, (0, 1, 2), has_cure=True),
    "MTUs differ": Case("mtu-differs", small_mtu, (0, 1, 2), has_cure=True),
    "a self-assigned address": Case("self-assigned", self_assigned, (1, 2)),
    "a firewall": Case("firewall", firewall, (0, 1, 2)),
    "a firewall that refuses": Case("firewall", refusing_firewall, (0, 1, 2)),
    "calls are dropped": Case("firewall", dropped, (0, 1, 2)),
    "a VPN's address": Case("vpn-path", of_a_vpn, (1, 2)),
}


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as found:
        yield found


def assert_named(findings: list[dict[str, Any]], case: Case, number: int, three: Cluster, among: int = 2) -> None:
    """Among the first findings, on the right host, with a fix."""
    name = json.loads(three.hostfile.read_text())["hosts"][number]["ssh"]
    first = [(one["check"], one["host"]) for one in findings[:among]]
    assert (case.check, name) in first, findings
    assert all(one["found"] and one["fix"] for one in findings)


def test_nothing_is_wrong_with_hosts_that_are_well(three: Cluster) -> None:
    code, said = doctor(three, "--starting-port", str(ranks.consecutive_ports(3)))
    assert code == 0 and not [one for one in said["findings"] if one["weight"] == "error"], said
    assert [host["answered"] for host in said["hosts"]] == [True] * 3
    assert {host["versions"]["mlx"] for host in said["hosts"]} == {said["hosts"][0]["versions"]["mlx"]}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_its_host(name: str, three: Cluster) -> None:
    case = FAULTS[name]
    if case.befall in (firewall, refusing_firewall) and not shutil.which("nft", path=PATH):
        pytest.skip("needs nft (nftables)")
    number = case.hosts[len(name) % len(case.hosts)]
    case.befall(three, number)
    code, said = doctor(three)
    assert_named(said["findings"], case, number, three)
    errors = {(one["check"], one["host"]) for one in said["findings"] if one["weight"] == "error"}
    assert code == (3 if not all(host["answered"] for host in said["hosts"]) else 2 if errors else 0)
    if case.has_cure:
        cure(next(one for one in said["findings"] if one["check"] == case.check), three)
        ends_s = time.monotonic() + 30  # a link that comes up takes a while
        while [one for one in said["findings"] if one["check"] == case.check]:
            assert time.monotonic() < ends_s, said
            _, said = doctor(three)


def cure(finding: dict[str, Any], three: Cluster) -> None:
    """Run the command of a fix, as it is told, on the host that it names."""
    command = re.search(r"(?:on (\S+): )?sudo ([^;]+)", finding["fix"])
    assert command, finding
    names = ["127.0.0.1", *(host.name for host in three.hosts[1:])]
    host = three.hosts[names.index(command[1] or finding["host"])]
    subprocess.run(host.command(["sh", "-c", command[2]]), check=True, capture_output=True)


@pytest.mark.parametrize(
    ("first", "second"), [("no sshd", "a cable is out"), ("another version", "an address is gone"), ("MTUs differ", "two networks overlap")]
)  # fmt: skip
def test_faults_in_pairs(first: str, second: str, three: Cluster) -> None:
    """The one doesn't hide the other."""
    FAULTS[first].befall(three, 2)
    FAULTS[second].befall(three, 0)
    _, said = doctor(three)
    assert_named(said["findings"], FAULTS[first], 2, three, among=4)
    assert_named(said["findings"], FAULTS[second], 0, three, among=4)


@pytest.mark.skipif(not shutil.which("nft", path=PATH), reason="needs nft (nftables)")
def test_firewalls_that_let_ranks_through(three: Cluster, tmp_path: Path) -> None:
    """Their hosts are called once more, and what came of it is kept with the rest."""
    for host in three.hosts:
        nft(
            host, "table inet f { chain in { type filter hook input priority 0; tcp dport 9 reject with tcp reset; }; }"
        )
    saved = tmp_path / "report.json"
    code, said = doctor(three, "--save", str(saved))
    assert (code, [one for one in said["findings"] if one["check"] == "firewall"]) == (0, [])
    called = [host["raw"]["called"] for host in json.loads(saved.read_text())]
    assert called == [{json.loads(three.hostfile.read_text())["hosts"][rank]["ips"][0]: ""} for rank in (1, 2, 0)]


def test_bridges_in_a_ring(three: Cluster) -> None:
    """All cables are in bridges; one of them lets little through, so that what goes round doesn't fill this machine."""
    one, other = three.hosts[:2]
    rated(one, one.cables[1], "32kbit")
    rated(other, other.cables[0], "32kbit")
    for host in three.hosts:
        names = [device(host, address) for address in host.cables.values()]
        ip(host, "link", "add", "br0", "type", "bridge")
        for name in names:
            ip(host, "link", "set", name, "master", "br0")
        ip(host, "link", "set", "br0", "up")
    _, said = doctor(three, "--check", "bridge-loop")
    (found,) = said["findings"]
    assert found["check"] == "bridge-loop" and "mini1, mini2" in found["found"]
    cure(found, three)
    _, said = doctor(three, "--check", "bridge-loop")
    assert said["findings"] == []


THROUGH_TREES = (
    "ForceCommand=exec unshare --mount sh -c 'mount --bind {0}/systemd /etc/systemd; mount --bind {0}/class /sys/class;"
    ' exec sh -c "$SSH_ORIGINAL_COMMAND"\''
)


def test_machines_that_sleep_and_are_hot(tmp_path: Path) -> None:
    """By what is in their files, which other hosts don't see."""
    heat, supply = tmp_path / "class" / "thermal" / "cooling_device0", tmp_path / "class" / "power_supply" / "BAT0"
    for folder in (heat, supply, tmp_path / "systemd" / "logind.conf.d", tmp_path / "here"):
        folder.mkdir(parents=True)
    (heat / "type").write_text("Processor\n")
    (heat / "cur_state").write_text("3\n")
    (tmp_path / "systemd" / "logind.conf.d" / "made.conf").write_text("[Login]\nIdleAction=suspend\n")
    with cluster(tmp_path / "here", [THROUGH_TREES.format(tmp_path)]) as three:
        _, said = doctor(three, "--check", "sleeps", "hot")
        names = [(one["check"], one["host"]) for one in said["findings"]]
        assert names == [("sleeps", "mini1"), ("hot", "mini1"), ("sleeps", "mini2"), ("hot", "mini2")]
        (tmp_path / "systemd" / "logind.conf.d" / "made.conf").unlink()  # which is the fix
        (heat / "cur_state").write_text("0\n")
        assert doctor(three, "--check", "sleeps", "hot")[1]["findings"] == []
        (supply / "uevent").write_text("POWER_SUPPLY_TYPE=Battery\nPOWER_SUPPLY_STATUS=Discharging\n")
        _, said = doctor(three, "--check", "sleeps", "hot")
        assert [one["found"] for one in said["findings"]] == ["it runs on its battery"] * 2


SHELLS = {
    "ssh-noise": 'echo "Welcome to mini"; exec sh -c "$SSH_ORIGINAL_COMMAND"',
    "open-files": 'ulimit -n 512; exec sh -c "$SSH_ORIGINAL_COMMAND"',
    "fast-synch": 'export MLX_METAL_FAST_SYNCH=1; exec sh -c "$SSH_ORIGINAL_COMMAND"',
    "login-shell": 'export SHELL=/usr/bin/fish; exec sh -c "$SSH_ORIGINAL_COMMAND"',
}


@pytest.mark.parametrize("check", SHELLS)
def test_what_a_login_brings_along(check: str, tmp_path: Path) -> None:
    with cluster(tmp_path, [f"ForceCommand={SHELLS[check]}"]) as three:
        code, said = doctor(three)
        assert code == 0
        assert [(one["check"], one["host"]) for one in said["findings"]] == [(check, "mini1"), (check, "mini2")]


def test_a_full_disk_and_a_taken_port(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with small_disk(tmp_path / "disk") as disk, cluster(tmp_path / "here", [f"SetEnv=HF_HOME={disk}"]) as three:
        fill(disk)
        port = 17_654
        listening = (
            f"import socket, time; s = socket.create_server(('', {port + 1})); print('on', flush=True); time.sleep(60)"
        )
        with ranks.single(three.hosts[1].command([sys.executable, "-c", listening])) as listener:
            listener.await_output("on")
            code, said = doctor(three, "--starting-port", str(port), "--check", "disk-full", "port-taken")
        assert code == 2
        assert {(one["check"], one["host"]) for one in said["findings"]} == {
            ("disk-full", "mini1"), ("disk-full", "mini2"), ("port-taken", "mini1"),
        }  # fmt: skip


HUB = """
import http.server
class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)
server = http.server.ThreadingHTTPServer(("", 18080), Hub)
print("on", flush=True)
server.serve_forever()
"""


def test_models_and_what_mpirun_is(tmp_path: Path) -> None:
    """A hub that wants a token, one that isn't reached, a model that is too large, and an MPI that is another's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * 4096)
    os.truncate(folder / "model.safetensors", 1 << 43)
    (tmp_path / "here").mkdir()
    given = f"SetEnv=HF_ENDPOINT=http://192.168.77.1:18080 HF_HOME={tmp_path / 'empty'}"
    with cluster(tmp_path / "here", [given]) as three:
        with ranks.single(three.hosts[0].command([sys.executable, "-c", HUB])) as hub:
            hub.await_output("on")
            _, said = doctor(three, "--model", "made-up/model")
        names = {"no-internet", "hub-token"}
        assert {(one["check"], one["host"]) for one in said["findings"] if one["check"] in names} == {
            ("no-internet", "127.0.0.1"), ("hub-token", "mini1"), ("hub-token", "mini2"),
        }  # fmt: skip
        python = tmp_path / "other" / "python"
        python.parent.mkdir()
        python.symlink_to(sys.executable)
        (python.parent / "mpirun").write_text("#!/bin/sh\necho HYDRA build details:\n")
        (python.parent / "mpirun").chmod(0o755)
        rewrite(three, lambda hosts: hosts[2].update(python=str(python)))
        three.hostfile.write_text(three.hostfile.read_text().replace('"ring"', '"mpi"'))
        code, said = doctor(three, "--model", str(folder))
        found = {one["check"]: one for one in said["findings"]}
        assert code == 2 and "8192.00 GiB" in found["memory-short"]["found"], said
        assert found["mpi-mixed"]["host"] == "mini2" and "model-missing" not in found, said


def config_with_caches_of(num_bytes: int) -> str:
    """A model whose weights are small beside its KV caches for 2,048 tokens."""
    layers, heads = 6, 64
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": 8 * (num_bytes // (8 * layers * heads * 2048 * 2 * 2)), "num_hidden_layers": layers, "rms_norm_eps": 1e-5,
        "vocab_size": 256, "max_position_embeddings": 2048,
    }  # fmt: skip
    return json.dumps(config)


def test_caches_are_a_part_of_what_must_fit(three: Cluster, tmp_path: Path) -> None:
    """The planner is asked, from whom a run would have its layers; by what was saved it needn't be asked again."""
    model, saved = tmp_path / "model", tmp_path / "report.json"
    model.mkdir()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for num_bytes, is_short in ((1 << 28, False), (4 * total, True)):
        (model / "config.json").write_text(config_with_caches_of(num_bytes))
        code, said = doctor(three, "--model", str(model), "--save", str(saved), "--check", "memory-short")
        assert (code, [one["check"] for one in said["findings"]]) == ((2, ["memory-short"]) if is_short else (0, []))
    assert re.match(
        r"the model doesn't fit: .* more memory needed for 2,048 tokens of context;", said["findings"][0]["found"]
    )
    shutil.rmtree(model)
    command = [
        sys.executable,
        "-m",
        "hippo_mpi.cluster",
        "doctor",
        "--from",
        str(saved),
        "--json",
        "--check",
        "memory-short",
    ]
    assert json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["findings"] == said["findings"]


def test_what_was_saved_is_judged_alike_and_tells_nothing_private(three: Cluster, tmp_path: Path) -> None:
    small_mtu(three, 1)
    saved = tmp_path / "report.json"
    code, said = doctor(three, "--save", str(saved))
    again = subprocess.run(
        [sys.executable, "-m", "hippo_mpi.cluster", "doctor", "--from", str(saved), "--json"],
        capture_output=True,
        text=True,
    )
    assert (again.returncode, json.loads(again.stdout)["findings"]) == (code, said["findings"])
    text = saved.read_text()
    assert not re.search(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", text)
    machine = Path("/etc/machine-id")
    assert not machine.exists() or not (own := machine.read_text().strip()) or own not in text


def test_a_host_that_does_not_answer_takes_no_longer_than_it_may(three: Cluster) -> None:
    ip(three.hosts[2], "link", "set", device(three.hosts[2], three.hosts[2].lan), "down")
    began_s = time.monotonic()
    code, said = doctor(three, "--timeout", "4")
    assert time.monotonic() - began_s < 15
    assert code == 3 and ("ssh-refused", "mini2") in {(one["check"], one["host"]) for one in said["findings"]}


def test_hosts_may_be_named(three: Cluster) -> None:
    command = [sys.executable, "-m", "hippo_mpi.cluster", "doctor", "mini1", "nosuch.invalid"]
    found = subprocess.run(
        three.hosts[0].command(command), capture_output=True, text=True, timeout=60, env={**os.environ, **three.env}
    )
    assert found.returncode == 3
    assert "mini1" in found.stdout and "error: ssh-refused on nosuch.invalid: " in found.stdout
