"""What setup decides without any host: what fits a host's Python, what is sent, which names are safe, what is written."""

from __future__ import annotations

import io
import json
import platform
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import replace
from importlib.metadata import distribution
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from mlx._distributed_utils.common import Hostfile as MlxHostfile

from hippo_mpi.cluster.asking.facts import Interface, Probed, read_facts
from hippo_mpi.cluster.cabling.address_plan import AddressPlan
from hippo_mpi.cluster.cabling.topology import Topology
from hippo_mpi.cluster.hostfile import Host, Hostfile, read_hostfile
from hippo_mpi.cluster.setting_up import discovery, fitting, packing, session, setup, setup_steps
from hippo_mpi.cluster.setting_up.fitting import There
from hippo_mpi.cluster.setting_up.made_hostfile import MadeHostfile
from hippo_mpi.cluster.verbs import find, remove
from hippo_mpi.cluster.verbs.host_options import HostOptions, hosts_meant
from hippo_mpi.errors import LaunchError, RankError
from hippo_mpi.runtime.source_digest import source_digest
from hippo_mpi.units import visible
from tests.unit.test_checks import raw

ABI = sysconfig.get_config_var("SOABI")
DEBIAN = There("Linux", "x86_64", sys.version_info[:3], ABI, "2.36", "")
MAC = There("Darwin", "arm64", sys.version_info[:3], ABI, "", "15.6.1")
TAGS = [
    ("py3-none-any", True, True),
    ("cp311-cp311-manylinux_2_35_x86_64", True, False),
    ("cp311-cp311-manylinux_2_39_x86_64", False, False),
    ("cp38-abi3-manylinux2014_x86_64", True, False),
    ("cp311-cp311-manylinux_2_28_aarch64", False, False),
    ("cp311-cp311-musllinux_1_2_x86_64", False, False),
    ("cp311-cp311-macosx_14_0_arm64", False, True),
    ("cp311-cp311-macosx_15_0_arm64", False, True),
    ("py3-none-macosx_26_0_arm64", False, False),
    ("cp311-cp311-macosx_11_0_x86_64", False, False),
    ("cp311-cp311-macosx_10_9_universal2", False, True),
    ("unknown", False, False),
]


@pytest.mark.parametrize(("tag", "debian", "mac"), TAGS)
def test_wheels_fit_where_they_run(tag: str, debian: bool, mac: bool) -> None:
    assert (fitting.fits(tag, DEBIAN), fitting.fits(tag, MAC)) == (debian, mac)


@pytest.mark.skipif(sys.platform != "linux", reason="of this machine's own wheels")
def test_this_machine_s_packages_fit_machines_like_it() -> None:
    here = replace(DEBIAN, machine=platform.machine(), glibc=platform.libc_ver()[1])
    found = packing.closure()
    assert {"mlx", "mlx-cpu", "mlx-lm", "numpy", "greenlet"} <= found.keys()
    assert not {"pytest", "gradio", "mpi4py", "hippo-mpi"} & found.keys()
    assert fitting.why_not(found, here) == ""
    assert "is built for" in fitting.why_not(found, replace(here, glibc="2.12"))
    assert "Python 3.9.6 there" in fitting.why_not(found, replace(here, python=(3, 9, 6)))
    assert "there" in fitting.why_not(found, replace(here, abi="cpython-311d"))
    assert f"mlx-lm=={found['mlx-lm'].version}" in fitting.pinned()


def test_an_old_python_is_named() -> None:
    with pytest.raises(LaunchError, match=r"^mini2 has Python 3\.9\.6, and ranks need 3\.11 or later: install"):
        fitting.check("mini2", replace(MAC, python=(3, 9, 6)))


def test_what_is_sent_is_this_project(tmp_path: Path) -> None:
    bundle = packing.project()
    with tarfile.open(fileobj=io.BytesIO(b"".join(bundle.chunks()))) as tar:
        tar.extractall(tmp_path, filter="data")
    assert source_digest(tmp_path / "hippo_mpi") == source_digest()
    assert bundle.name == packing.project().name
    version = distribution("hippo-mpi").version
    code = (
        "from importlib.metadata import version; from hippo_mpi.config.bundled import BUNDLED_MODEL, BUNDLED_NAMES;"
        "import hippo_mpi; print(hippo_mpi.__file__, version('hippo-mpi'), (BUNDLED_MODEL / 'config.json').exists())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert found.stdout.split() == [str(tmp_path / "hippo_mpi" / "__init__.py"), version, "True"], found.stderr


# ---- names of strangers

HOSTILE = "=;eth0;IPv4;a\\027[31mb;_ssh._tcp;local;-oProxyCommand\\061touch\\032x.local;192.168.1.9;22;"
LONG = f"=;eth0;IPv4;{'n' * 10_000};_ssh._tcp;local;{'h' * 10_000}.local;192.168.1.8;22;"
AVAHI = f"""+;eth0;IPv4;mini2;_ssh._tcp;local
=;wlan0;IPv4;Anna\\226\\128\\153s\\032mini\\0592;_ssh._tcp;local;mini2.local;192.168.1.12;22;"txt"
=;eth0;IPv6;mini2;_ssh._tcp;local;mini2.local;fe80::1;22;
=;eth0;IPv4;x;_ssh._tcp;local;y.local;999.1.1.1;22;
=;eth0;IPv4;x;_ssh._tcp;local;y.local;192.168.1.7;port;
{HOSTILE}
{LONG}
"""
BROWSED = """Browsing for _ssh._tcp.local.
DATE: ---Thu 26 Nov 2026---
12:00:00.000  ...STARTING...
Timestamp     A/R    Flags  if Domain               Service Type         Instance Name
12:00:00.001  Add        3   4 local.               _ssh._tcp.           Anna's mini
12:00:00.001  Add        2   4 local.               _ssh._tcp.           -oX
12:00:00.002  Rmv        0   4 local.               _ssh._tcp.           gone
"""


def test_avahi_is_read() -> None:
    found = list(discovery.read_avahi(AVAHI))
    assert found[0].service == "Anna\N{RIGHT SINGLE QUOTATION MARK}s mini;2"
    assert [(one.host[:20], one.address, one.interface, one.is_usable) for one in found] == [
        ("mini2.local", "192.168.1.12", "wlan0", True),
        ("-oProxyCommand=touch", "192.168.1.9", "eth0", False),
        ("h" * 20, "192.168.1.8", "eth0", False),
    ]


def test_apple_s_dns_sd_is_read() -> None:
    assert list(discovery.read_apple_names(BROWSED)) == [("Anna's mini", 4)]
    line = (
        "12:00:00.002  Anna\\226\\128\\153s\\032mini._ssh._tcp.local. can be reached at mini2.local.:22 (interface 1)\n"
    )
    place = discovery.read_apple_place(line)
    assert place is not None and place[:2] == ("mini2.local", 22)
    assert discovery.read_apple_place("12:00:00.000  ...STARTING...") is None
    text = "12:00:00.003  Add  40000002      4  mini2.local.      192.168.1.12      120\n"
    assert discovery.read_apple_address(text) == "192.168.1.12"


def test_names_of_strangers_are_shown_without_their_tricks() -> None:
    lines = list(find.lines_of(list(discovery.read_avahi(AVAHI)), None))
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert r"a\x1b[31mb" in "".join(lines) and lines[-1] == "to set one up: ./launch/cluster setup mini2.local"
    assert [line.endswith("not a name for ssh: leave it") for line in lines[1:4]] == [False, True, True]
    assert visible("\u202egpj\x07\n\x9b") == r"\u202egpj\x07\n\x9b" and len(visible("x" * 10_000)) < 400


@pytest.mark.skipif(sys.platform != "darwin", reason="needs dns-sd, of macOS")
def test_apple_s_dns_sd_is_run() -> None:
    command = [sys.executable, "-m", "hippo_mpi.cluster", "find", "--timeout", "3", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "") and isinstance(json.loads(found.stdout), list)


def test_what_runs_through_a_login_shell_is_quoted_for_any() -> None:
    """One pair of single quotes, and nothing within that fish, dash or csh would change."""
    assert not set("'\\`\n!") & set(session._FIND)


# ---- addresses


@pytest.mark.parametrize(
    ("came_by", "wanted"),
    [
        ("192.168.1.11 50000 192.168.1.12 22", ["192.168.1.11", "192.168.1.12"]),
        ("100.70.0.1 50000 100.70.0.2 22", ["172.17.0.1", "172.17.0.1"]),  # a VPN's are no better than any
        ("fe80::1 50000 fe80::2 22", ["172.17.0.1", "172.17.0.1"]),
        ("198.51.100.1 50000 192.168.1.12 22", ["172.17.0.1", "172.17.0.1"]),  # through another machine
        ("nonsense", ["172.17.0.1", "172.17.0.1"]),
    ],
)
def test_without_cables_ranks_are_where_ssh_goes(came_by: str, wanted: list[str]) -> None:
    """A network that both have, such as one for containers, needn't lead from one to the other."""
    hosts = (Host("127.0.0.1", ("172.17.0.1",)), Host("mini2", ("172.17.0.1",)))
    topology = Topology((), (0,), Hostfile(hosts, backend="ring"), AddressPlan())
    here = Interface("eth0", (IPv4Interface("192.168.1.11/24"), IPv4Interface("100.70.0.1/32")))
    facts = replace(read_facts(raw()), interfaces=(here,), environment={"SSH_CONNECTION": came_by})
    probed = [Probed(host, facts) for host in hosts]
    assert [host.ips[0] for host in setup._by_ssh(topology, probed).hostfile.hosts] == wanted


# ---- the hostfile

HOSTS = Hostfile((Host("127.0.0.1", ("10.205.0.1",)), Host("anna@mini2", ("10.205.0.2",))), backend="ring")


def made(path: Path) -> MadeHostfile:
    file = MadeHostfile(path)
    file.write(file.wanted(HOSTS, ["project-1", "venv-1"], "~/.hippo-mpi/venv/bin/python"))
    return MadeHostfile(path)


def test_the_hostfile_is_one_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    file = made(path)
    found = read_hostfile(path)
    assert [(host.ssh, host.ips, host.python) for host in found.hosts] == [
        ("127.0.0.1", ("10.205.0.1",), None), ("anna@mini2", ("10.205.0.2",), "~/.hippo-mpi/venv/bin/python"),
    ]  # fmt: skip
    assert file.wanted(HOSTS, ["project-1", "venv-1"], "~/.hippo-mpi/venv/bin/python") == file.text
    assert file.wanted(HOSTS, ["project-2", "venv-1"], "~/.hippo-mpi/venv/bin/python") != file.text
    of_mlx = MlxHostfile.from_file(str(path))
    assert [(host.ssh_hostname, host.ips) for host in of_mlx.hosts] == [
        (host.ssh, list(host.ips)) for host in found.hosts
    ]
    assert file.names == ["anna@mini2"] and [one.name for one in tmp_path.iterdir()] == ["hosts.json"]


def test_what_people_add_to_it_stays(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    made(path)
    raw = json.loads(path.read_text())
    raw["envs"].append("MLX_X=1")
    raw["hosts"][1]["speed"] = 2
    path.write_text(json.dumps(raw))
    again = json.loads(MadeHostfile(path).wanted(HOSTS, [], "~/p"))
    assert again["envs"] == ["MLX_X=1"] and again["hosts"][1]["speed"] == 2


def test_hosts_come_and_go(tmp_path: Path) -> None:
    file = made(tmp_path / "hosts.json")
    assert [host.ssh for host in file.with_hosts(["mini3", "anna@mini2"]).hosts] == ["127.0.0.1", "anna@mini2", "mini3"]
    assert file.without("anna@mini2") == ""
    file.write("")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['[{"ssh": "127.0.0.1"}]', '{"hosts": [{"ssh": "a"}]}'])
def test_another_s_hostfile_is_not_overwritten(content: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(content)
    with pytest.raises(LaunchError, match="wasn't written by setup, and stays as it is"):
        MadeHostfile(path)


def test_a_copy_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = packing.Bundle("venv-1", [], {f"part{number}": bytes(4 << 20) for number in range(8)})
    now_s, said = iter(range(0, 1000, 2)), list[str]()
    monkeypatch.setattr(setup_steps.time, "monotonic", lambda: float(next(now_s)))
    data = b"".join(setup_steps.told(bundle, said.append))
    assert data == b"".join(bundle.chunks())
    assert 5 < len(said) < 12 and all(line.endswith(" of 32.0 MiB copied") for line in said), said


def test_who_names_no_host_is_told_of_the_hostfile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(hosts_meant(HostOptions()).hosts) == 1 and capsys.readouterr().err == ""
    made(tmp_path / "hosts.json")
    assert len(hosts_meant(HostOptions()).hosts) == 1
    assert capsys.readouterr().err == "only this machine is meant; for the hosts of hosts.json: --hostfile hosts.json\n"
    assert len(hosts_meant(HostOptions(hosts=("mini2",))).hosts) == 2 and capsys.readouterr().err == ""


def test_a_host_that_is_gone_can_be_taken_out_of_the_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> bool:
        raise RankError("ssh-refused on mini2: timed out")

    monkeypatch.setattr(remove, "take_away", lost)
    path = tmp_path / "hosts.json"
    options = remove.Options(host="mini2", hostfile=path)
    with pytest.raises(RankError, match=r"timed out$"):
        remove.run(options)
    made(path)
    with pytest.raises(RankError, match=r"timed out; if it is gone for good, take its entry out of .*hosts\.json$"):
        remove.run(options)


@pytest.mark.parametrize("line", [b"[" * 100_000, b"5", b'["error"]', b'"an error"', b"{}"])
def test_an_agent_s_answer_that_is_none_gets_a_line(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.Session, "_line", lambda *_: line)
    with pytest.raises(RankError, match="mini2 gave an answer that can't be read"):
        session.Session("mini2")._answer(0.0)
