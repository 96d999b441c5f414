"""Lists of hosts of other launchers, read and written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippo_mpi.cluster.host_formats import FORMATS, expand, read_any, written
from hippo_mpi.cluster.hostfile import Host, Hostfile, read_hostfile
from hippo_mpi.errors import UserError


def read(text: str, folder: Path) -> list[str]:
    path = folder / "hosts"
    path.write_text(text)
    return [host.ssh for host in read_any(path).hosts]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("mini1 slots=2\nmini2 slots=1 max_slots=4\n", ["mini1", "mini1", "mini2"]),
        ("# a cluster\nmini1:2\n\nmini2:1  # the other\n", ["mini1", "mini1", "mini2"]),
        ("mini1\nmini1\nmini2\n", ["mini1", "mini1", "mini2"]),
        ("node[09-11,3],login", ["node09", "node10", "node11", "node3", "login"]),
        ("rack1-node[1-2].local slots=2", ["rack1-node1.local"] * 2 + ["rack1-node2.local"] * 2),
        ('[{"ssh": "mini1", "ips": ["10.0.0.1"]}]', ["mini1"]),
    ],
)  # fmt: skip
def test_formats_are_read(text: str, names: list[str], tmp_path: Path) -> None:
    assert read(text, tmp_path) == names


@pytest.mark.parametrize(
    "text", ["", "# nothing", "node[1-", "node[a-b]", "node[1-2]x[3]", "a b c", "-oX=y", "a slots=99999", "n[1-99999]"]
)
def test_what_is_no_list_of_hosts(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hosts"):
        read(text, tmp_path)


@given(st.lists(st.sampled_from(["mini1", "mini2", "10.0.0.3"]), min_size=1, max_size=6), st.sampled_from(FORMATS[1:]))
def test_what_is_written_is_read_again(names: list[str], form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert read(written(Hostfile(tuple(map(Host, names))), form), Path(folder)) == names


def test_mlx_gets_addresses_and_keeps_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "openmpi").write_text("localhost slots=2\n")
    assert (
        json.loads(written(read_any(tmp_path / "openmpi"), "mlx"))["hosts"]
        == [{"ssh": "localhost", "ips": ["127.0.0.1"], "rdma": []}] * 2
    )
    ours = {
        "backend": "jaccl",
        "envs": ["A=1"],
        "hosts": [{"ssh": "mini1", "ips": ["10.0.0.1"], "rdma": [None], "python": "~/p"}],
    }
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(ours))
    (tmp_path / "again.json").write_text(written(read_any(path), "mlx"))
    again = read_hostfile(tmp_path / "again.json")
    assert (again.hosts, again.backend, again.envs) == (read_hostfile(path).hosts, "jaccl", ("A=1",))
    (tmp_path / "nosuch").write_text("nosuch.invalid\n")
    with pytest.raises(UserError, match=r"can't resolve nosuch.invalid"):
        written(read_any(tmp_path / "nosuch"), "mlx")


def test_slurm_s_lists() -> None:
    assert expand("a[1-2],b,c[003]", "x") == ["a1", "a2", "b", "c003"]
