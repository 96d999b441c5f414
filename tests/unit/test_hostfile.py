"""Hostfiles: what they may say, and what is left of them when a host is left out."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.cluster import host_checks
from hippo_mpi.cluster.host_formats import read_any
from hippo_mpi.cluster.hostfile import Host, Hostfile, hostfile_of, read_hostfile
from hippo_mpi.cluster.starting.start_plan import start_plan
from hippo_mpi.errors import LaunchError
from hippo_mpi.serve import launch_plan, make_parser

MESH = Hostfile(
    tuple(
        Host(
            f"mini{rank}", (f"192.168.1.{rank + 1}",), tuple(None if to == rank else f"{rank}to{to}" for to in range(4))
        )
        for rank in range(4)
    ),
    backend="jaccl",
    envs=("MLX_METAL_FAST_SYNCH=0",),
)

SIX = Hostfile(tuple(Host(f"mini{rank}", (f"192.168.1.{rank + 1}",)) for rank in range(6)))


def write(folder: Path, content: Any) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps(content))
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(MESH.to_json())
    assert read_hostfile(path) == Hostfile(MESH.hosts, f"hostfile {path}", MESH.backend, MESH.envs)


def test_a_host_that_is_left_out_leaves_the_cables_of_the_others(tmp_path: Path) -> None:
    left = MESH.only([0, 1, 3])
    assert [host.ssh for host in left.hosts] == ["mini0", "mini1", "mini3"]
    assert [host.rdma for host in left.hosts] == [
        (None, "0to1", "0to3"), ("1to0", None, "1to3"), ("3to0", "3to1", None),
    ]  # fmt: skip
    left.check("jaccl")
    assert (left.backend, left.envs) == (MESH.backend, MESH.envs)
    assert MESH.only([3, 0]).hosts[0].rdma == (None, "3to0")


def test_a_ring_of_cables_that_is_broken_is_told() -> None:
    ring = Hostfile(
        tuple(
            Host(host.ssh, host.ips, tuple(device if abs(rank - to) in (1, 3) else None for to, device in enumerate(host.rdma)))
            for rank, host in enumerate(MESH.hosts)
        )
    )  # fmt: skip
    ring.check("jaccl-ring")
    with pytest.raises(
        LaunchError, match=r"an RDMA device from rank 0 \(mini0\) to rank 2 \(mini2\), and there is none"
    ):
        ring.check("jaccl")
    with pytest.raises(LaunchError, match=r"jaccl-ring needs an RDMA device from rank 1 \(mini1\) to rank 2 \(mini3\)"):
        ring.only([0, 1, 3]).check("jaccl-ring")


@pytest.mark.parametrize(
    ("entries", "backend", "told"),
    [
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b"}], "ring", r'rank 1 \(b\) has no "ips"'),
        ([{"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None]}], "nccl", "unknown backend 'nccl'; choose from ring,"),
        ([{"ssh": "a", "rdma": [None]}], "jaccl", r'rank 0 \(a\) has no "ips", where ranks connect for jaccl'),
        (
            [{"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "x"]}, {"ssh": "b", "rdma": ["x"]}],
            "jaccl", r"for each of 2 ranks, but rank 1 \(b\) has 1; hippo_mpi also runs with --backend ring",
        ),
        (
            [{"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "x"]}, {"ssh": "b", "rdma": ["x", "x"]}],
            "jaccl", r"must be null for rank 1 itself",
        ),
        ([{"ssh": "a"}, {"ssh": "b", "python": "~/p"}], "mpi", r'"python" of rank 1 \(b\) is not supported with mpi'),
        ([{"ssh": "a", "speed": 2}, {"ssh": "b"}], "mpi", r'"speed" of rank 0 \(a\) is not supported with mpi'),
    ],
)  # fmt: skip
def test_what_a_backend_lacks_is_named(entries: list[Any], backend: str, told: str) -> None:
    with pytest.raises(LaunchError, match=f"^somewhere: .*{told}"):
        hostfile_of(entries, "somewhere").check(backend)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "lists no hosts"),
        ({"hosts": {}}, "lists no hosts"),
        ("mini1", "lists no hosts"),
        ([{"ips": []}], 'rank 0 has no "ssh"'),
        ([{"ssh": "a", "speed": 0}], r'"speed" of rank 0 \(a\) must be a number above 0'),
        ([{"ssh": "a", "speed": "fast"}], r'"speed" of rank 0 \(a\) must be a number above 0'),
        ([{"ssh": "a", "speed": True}], r'"speed" of rank 0 \(a\) must be a number above 0'),
        ([{"ssh": "a", "ips": "10.0.0.1"}], r'"ips" of rank 0 \(a\) must be a list'),
        ([{"ssh": "a", "ips": ["mini1"]}], "'mini1' of rank 0 is not an IP address"),
        ({"backend": 1, "hosts": [{"ssh": "a"}]}, '"backend" must be a name such as "ring", not 1'),
        ({"envs": "A=1", "hosts": [{"ssh": "a"}]}, '"envs" must be a list of "NAME=value"'),
        ({"envs": ["A B=1"], "hosts": [{"ssh": "a"}]}, '"envs" must be a list of "NAME=value"'),
        ({"envs": ["A=1\0"], "hosts": [{"ssh": "a"}]}, '"envs" must be a list of "NAME=value"'),
        ({"envs": ["A=\ud800"], "hosts": [{"ssh": "a"}]}, '"envs" must be a list of "NAME=value"'),
        ([{"ssh": "a", "python": "/x\0"}], r'"python" of rank 0 \(a\) must be a path'),
        ([{"ssh": "a", "python": "~/\udfffx"}], r'"python" of rank 0 \(a\) must be a path'),
        ([{"ssh": "a", "ips": [1]}], "1 of rank 0 is not an IP address"),
        ([{"ssh": "a", "rdma": [1]}], r'"rdma" of rank 0 \(a\) must have names of devices'),
        ([{"ssh": "a", "rdma": [["x", None]]}], r'"rdma" of rank 0 \(a\) must have names of devices'),
    ],
)  # fmt: skip
def test_what_no_hostfile_is_gets_a_line(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=f"hosts.json:? .*{told}"):
        read_hostfile(write(tmp_path, content))


@pytest.mark.parametrize("brackets", ["[", '{"a":', "[" * 500 + "]" * 500])
def test_a_hostfile_of_many_brackets_gets_a_line(brackets: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    for text in (brackets * 20_000, f'{{"backend": {"[" * 900 + "]" * 900}}}'):
        path.write_text(text)
        with pytest.raises(LaunchError, match=r"is too deeply nested|is not JSON|must be a name"):
            read_any(path)


@pytest.mark.parametrize("name", ["mini2", "anna@mini2.local", "10.0.0.1", "[fe80::1%en5]", "a_b-c"])
def test_names_of_hosts(name: str) -> None:
    assert hostfile_of([{"ssh": name}], "somewhere").hosts[0].ssh == name


HOSTILE = [
    "-oProxyCommand=touch /tmp/x",
    "-v",
    "a@-oProxyCommand=x",
    "",
    " ",
    "a b",
    "a;b",
    "a\x1b[31m",
    "a\n",
    "$(x)",
    "é",
]


@pytest.mark.parametrize("name", [*HOSTILE, "-" * 10_000])
def test_a_hostile_name_reaches_neither_ssh_nor_the_terminal(name: str) -> None:
    refused(name)


@given(st.text(max_size=30))
def test_any_other_text_is_refused_or_harmless(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]%@-]+", name) or name.startswith("-") or "@-" in name:
        refused(name)


def refused(name: str) -> None:
    with pytest.raises(LaunchError) as caught:
        hostfile_of([{"ssh": name}], "somewhere")
    line = str(caught.value)
    assert line.isascii() and line.isprintable() and len(line) < 700


def test_a_server_starts_what_its_hostfile_names(tmp_path: Path) -> None:
    """JACCL, too, with its envs; a host that is lost takes its row and its column along, and one that is left needs none."""
    path = tmp_path / "hosts.json"
    path.write_text(MESH.to_json())
    options = make_parser().read(["--hostfile", str(path), "--layer-split", "3,3,3,3"])
    whole = launch_plan(["--layer-split", "3,3,3,3", "--port", "0"], options, MESH, None)
    assert whole.backend == "jaccl" and whole.hostfile == MESH
    left = launch_plan(["--layer-split", "3,3,3,3", "--port", "0"], options, MESH, [0, 2])
    assert left.backend == "jaccl" and list(left.words[2:]) == ["--port", "0"]
    assert left.hostfile is not None and [host.rdma for host in left.hostfile.hosts] == [(None, "0to2"), ("2to0", None)]
    assert launch_plan([], options, MESH, [1]).backend == "ring"
    for living, stages in (([0], []), ([0, 1], []), ([0, 1, 2], []), ([0, 1, 2, 3], ["--stages", "2"])):
        shared = ["--parallel", "tensor", "--stages", "2"]  # which needs four ranks, or six
        plan = launch_plan(shared, make_parser().read([*shared, "--hostfile", str(path)]), SIX, living)
        assert list(plan.words[2:]) == ["--parallel", "tensor", *stages]
    asked = make_parser().read(["--hostfile", str(path), "--backend", "ring"])
    assert launch_plan([], asked, MESH, None).backend == "ring"


def test_a_host_is_asked_by_its_own_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of this machine need not be there."""
    commands: list[list[str]] = []

    async def succeeds(command: list[str], data: bytes = b"") -> bool:
        commands.append(command)
        return True

    monkeypatch.setattr(host_checks, "_succeeds", succeeds)
    hosts = [Host("mini1", ("10.0.0.1",)), Host("mini2", ("10.0.0.2",), python="~/my hippo/python")]
    assert asyncio.run(host_checks.linked(hosts, [0, 1])) == [0, 1]
    assert commands[1][-2] == "mini2" and commands[1][-1].startswith("~/'my hippo/python' -c ")


def test_a_host_s_speed_is_told_to_its_rank() -> None:
    hostfile = hostfile_of([{"ssh": "a", "ips": ["10.0.0.1"], "speed": 1.5}, {"ssh": "b", "ips": ["10.0.0.2"]}], "x")
    plan = start_plan(hostfile, "ring", ["-m", "x"], 17000)
    assert [rank.environment for rank in plan.ranks] == [{"MLX_RANK": "0", "HIPPO_SPEED": "1.5"}, {"MLX_RANK": "1"}]


def test_tracebacks_are_asked_for_on_every_host(monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile = hostfile_of([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}], "x")
    monkeypatch.delenv("HIPPO_TRACEBACK", raising=False)
    assert start_plan(hostfile, "ring", ["-m", "x"], 17000).environment == {}
    monkeypatch.setenv("HIPPO_TRACEBACK", "1")
    assert start_plan(hostfile, "ring", ["-m", "x"], 17000).environment == {"HIPPO_TRACEBACK": "1"}
