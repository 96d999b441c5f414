"""hippo_mpi.cluster sync over ssh between namespaces: what each host gets, from where, through kills and damage."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from hippo_mpi.cluster.sync.frames import PIECE_BYTES
from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.views.spans import header_bytes, num_bytes, spans_here
from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT, Host, cabled_hosts, cut, rated, reached_by_ssh
from tests.commands.test_hub import REPO, Hub
from tests.parity.test_depth import make_adapter

_PATIENCE_S = 200.0  # on a machine that has much to do
ROOT = Path(__file__).parents[2]
SYNC = [sys.executable, "-m", "hippo_mpi.cluster", "sync"]
HEAD = header_bytes((BUNDLED_MODEL / "model.safetensors").read_bytes())
pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(300),
]


class Log(list[int]):
    """Numbers that another process reads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def append(self, number: int) -> None:
        with self.path.open("a") as stream:
            stream.write(f"{number}\n")


def serve_hub(folder: str, log: str) -> None:
    """A hub with one repo; prints its port."""
    handler = type("Handler", (Hub,), {"folder": Path(folder), "downloads": [], "ranges": Log(Path(log))})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


class Bed:
    """Hosts with a cache each; the first has the hub, or the folder, and the others have neither."""

    def __init__(self, hosts: list[Host], env: dict[str, str], folder: Path, endpoint: str) -> None:
        self.hosts, self.env, self.folder, self.hostfile = hosts, env, folder, folder / "hosts.json"
        self.endpoint = endpoint
        entries = [self._entry(host) for host in hosts]
        self.hostfile.write_text(json.dumps({"backend": "ring", "hosts": entries}))

    def home(self, number: int) -> Path:
        return self.folder / f"home{number}"

    def _entry(self, host: Host) -> dict[str, Any]:
        if host.number == 0:
            return {"ssh": "127.0.0.1", "ips": [host.lan]}
        python = self.folder / f"python{host.number}"
        own = self.home(host.number) / "origin"
        own.mkdir(parents=True)
        hidden = f"mount --bind {own} {self.folder / 'origin'}"  # hosts of one machine have other folders here
        python.write_text(
            f"#!/bin/sh\nexport HF_HOME={self.home(host.number)} HF_ENDPOINT=http://127.0.0.1:9 PYTHONPATH={ROOT}\n"
            f"""exec unshare --mount sh -c '{hidden}; exec "$@"' sh {sys.executable} "$@"\n"""
        )
        python.chmod(0o755)
        return {"ssh": host.name, "ips": [host.lan], "python": str(python)}

    def command(self, words: Sequence[str]) -> list[str]:
        settings = [
            f"HF_HOME={self.home(0)}",
            f"HF_ENDPOINT={self.endpoint}",
            f"PYTHONPATH={ROOT}",
            "HF_HUB_DISABLE_XET=1",
        ]
        return self.hosts[0].command(["env", *settings, *words])

    def sync(self, model: str, *options: str) -> tuple[int, dict[str, Any], str]:
        command = [*SYNC, model, "--hostfile", str(self.hostfile), "--json", "--timeout", "60"]
        found = subprocess.run(
            self.command([*command, *options]),
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            env={**os.environ, **self.env},
        )
        return found.returncode, json.loads(found.stdout) if found.stdout else {}, found.stderr

    def places(self) -> list[int]:
        """Processes of sync on the other hosts."""
        own, found = str(self.folder).encode(), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
                if b"hippo_mpi.cluster.sync.place" in words and own in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return [pid for pid in found if b"home0" not in Path(f"/proc/{pid}/environ").read_bytes()]

    def cut_off(self, number: int) -> None:
        """Pull a host's cable to the LAN."""
        device = f"en{os.getpid() % 100_000}{number}"
        subprocess.run(["ip", "-n", self.hosts[number].namespace, "link", "set", device, "down"], check=True)

    def view(self, number: int) -> Path:
        (found,) = (self.home(number) / "hippo_mpi").iterdir()
        return found

    def generate(self, model: str, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "hippo_mpi.run", "--hostfile", str(self.hostfile), "--model", model, "--json"]
        with ranks.single(self.command([*command, *options]), env=self.env) as running:
            assert running.wait(_PATIENCE_S) == 0, running.err
            found: dict[str, Any] = json.loads(running.out)
            return found


@contextlib.contextmanager
def bed(folder: Path, count: int = 2, cables: Sequence[tuple[int, int]] = ()) -> Iterator[Bed]:
    (folder / "origin").mkdir(parents=True)
    with cabled_hosts(count, cables, lan=True) as hosts, reached_by_ssh(hosts, folder) as env:
        served = (
            f"from tests.spmd.test_sync import serve_hub; serve_hub({str(folder / 'repo')!r}, {str(folder / 'log')!r})"
        )
        with ranks.single(hosts[0].command([sys.executable, "-c", served]), env={"PYTHONPATH": str(ROOT)}) as hub:
            hub.await_output("\n")
            yield Bed(hosts, env, folder, f"http://127.0.0.1:{hub.out.strip()}")


def copy_model(folder: Path) -> int:
    """The bundled model in a folder; returns the size of its weights."""
    folder.mkdir()
    for path in BUNDLED_MODEL.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    return (folder / "model.safetensors").stat().st_size


def folder_of_bytes(folder: Path, size: int) -> int:
    """A folder that looks like a model's, with one file of random bytes; returns that file's size."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    header = json.dumps({"weights": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, size, 1 << 20):
            stream.write(os.urandom(min(1 << 20, size - start)))
        return stream.tell()


def downloaded(folder: Path) -> int:
    return sum(map(int, (folder / "log").read_text().split()))


def data_bytes(file: Path) -> int:
    """Bytes behind the head of a weight file."""
    data = file.read_bytes()
    return len(data) - header_bytes(data)


def held(two: Bed, number: int) -> int:
    """Bytes that a host has of the one weight file."""
    views = [path for path in (two.home(number) / "hippo_mpi").glob("*--*")]
    return sum(num_bytes(spans_here(view / "model.safetensors")) for view in views)


@pytest.fixture(scope="module")
def alone() -> list[int]:
    """Tokens that one rank gives."""
    with ranks.single([str(ranks.BIN / "hippo_mpi.generate"), "--json", "--max-tokens", "30"]) as running:
        assert running.wait(_PATIENCE_S) == 0, running.err
        return list(json.loads(running.out)["token_ids"])


def test_a_repo_of_one_file(tmp_path: Path, alone: list[int]) -> None:
    """Each host has its own bytes, over the internet each came once; another split moves the difference, between hosts."""
    total = copy_model(tmp_path / "repo")
    with bed(tmp_path, 3) as three:
        for split in ("4,4,4", "2,4,6"):
            before = [held(three, number) for number in range(3)]
            code, said, err = three.sync(REPO, "--layer-split", split)
            assert code == 0 and said["layer_split"] == [int(count) for count in split.split(",")], err
            hosts = {host["ranks"][0]: host for host in said["hosts"]}
            assert sum(host["needed"] for host in hosts.values()) < total + 3 * 20_000  # the head is everywhere
            for number, host in hosts.items():
                assert held(three, number) == before[number] + host["came"] + (not before[number]) * HEAD
                if split == "4,4,4":
                    assert held(three, number) == host["needed"]
                    stored = (three.view(number) / "model.safetensors").stat().st_blocks * 512
                    assert stored <= host["needed"] + (1 << 20)
            assert said["sources"]["hub"] == (total - HEAD if split == "4,4,4" else 0)
            assert downloaded(tmp_path) <= total + 100_000  # by which the head is looked for
        assert three.generate(REPO, "--layer-split", "2,4,6", "--max-tokens", "30")["token_ids"] == alone
        assert downloaded(tmp_path) <= total + 100_000


def test_a_folder_of_this_machine(tmp_path: Path, alone: list[int]) -> None:
    """The planner shares layers out; a byte that flips on the other's disk is found; an adapter comes along."""
    with bed(tmp_path) as two:
        origin = tmp_path / "origin" / "model"
        copy_model(origin)
        code, said, err = two.sync(str(origin))
        assert code == 0, err
        assert two.view(1).name.startswith("local--model--") and not (two.home(0) / "hippo_mpi").exists()
        split = ",".join(map(str, said["layer_split"]))
        weights = two.view(1) / "model.safetensors"
        start, stop = spans_here(weights)[1]
        with weights.open("r+b") as stream:
            stream.seek((start + stop) // 2)
            byte = stream.read(1)[0]
            stream.seek((start + stop) // 2)
            stream.write(bytes([byte ^ 8]))
        (origin / "config.json").write_text(f"{(origin / 'config.json').read_text()}\n")
        code, said, err = two.sync(str(origin), "--layer-split", split, "--verify")
        host = next(host for host in said["hosts"] if host["host"] == "mini1")
        assert code == 0 and host["damaged"] == host["came"] == stop - start, (said, err)
        assert (two.view(1) / "config.json").read_text() == (origin / "config.json").read_text()
        data = (origin / "model.safetensors").read_bytes()
        assert all(weights.read_bytes()[slice(*span)] == data[slice(*span)] for span in spans_here(weights))
        adapter = origin.with_name("adapter")
        make_adapter(BUNDLED_MODEL, adapter, 12)
        parts = mx.load(str(adapter / "adapters.safetensors"))
        mx.save_safetensors(str(adapter / "adapters.safetensors"), {name: 0 * array for name, array in parts.items()})
        code, said, err = two.sync(str(origin), "--layer-split", split, "--adapter-path", str(adapter))
        assert code == 0 and all(not host["came"] for host in said["hosts"]), (said, err)
        assert [host["came"] for host in said["adapter"]["hosts"]] == [data_bytes(adapter / "adapters.safetensors"), 0]
        options = ["--layer-split", split, "--adapter-path", str(adapter), "--max-tokens", "30"]
        assert two.generate(str(origin), *options)["token_ids"] == alone


@pytest.mark.parametrize("victim", ["sync", "place"])
def test_a_kill_costs_a_few_pieces(victim: str, tmp_path: Path) -> None:
    with bed(tmp_path) as two:
        origin = tmp_path / "origin" / "model"
        size = folder_of_bytes(origin, 100 << 20)
        command = [*SYNC, str(origin), "--hostfile", str(two.hostfile), "--whole"]
        with ranks.single(two.command(command), env=two.env) as running:
            while not held(two, 1) > 0:
                assert running.process.poll() is None, running.err
            for pid in [running.process.pid] if victim == "sync" else two.places():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = running.wait(_PATIENCE_S)
        kept = held(two, 1)
        if victim == "place":
            last = running.err.splitlines()[-1]
            assert code == 3 and re.fullmatch(r"error: mini1: .+; the same command goes on from what is there", last)
        code, said, err = two.sync(str(origin), "--whole", "--verify")
        host = next(host for host in said["hosts"] if host["host"] == "mini1")
        assert code == 0 and host["damaged"] == 0 and host["came"] >= size - kept - 4 * PIECE_BYTES, (said, err)
        assert (two.view(1) / "model.safetensors").read_bytes() == (origin / "model.safetensors").read_bytes()


def traffic(host: Host, address: str) -> int:
    """Bytes that the interface with an address has received."""
    shown = subprocess.run(["ip", "-n", host.namespace, "-s", "-j", "addr"], check=True, capture_output=True).stdout
    rows = [one for one in json.loads(shown) if any(some["local"] == address for some in one["addr_info"])]
    return int(rows[0]["stats64"]["rx"]["bytes"])


def test_bytes_between_two_hosts_go_by_their_cable(tmp_path: Path) -> None:
    """Not through this machine; when the cable is pulled in the middle, the rest does."""
    with bed(tmp_path, 3, [(1, 2)]) as three:
        origin = tmp_path / "origin" / "model"
        size = folder_of_bytes(origin, 40 << 20)
        one, two = three.hosts[1:]
        entries = json.loads(three.hostfile.read_text())["hosts"]
        for entry, ips in zip(entries, ([], [one.cables[2]], [two.cables[1]]), strict=True):
            entry["ips"] = ips
        three.hostfile.write_text(json.dumps(entries[:2]))
        code, said, err = three.sync(str(origin), "--whole")
        assert code == 0 and said["direct"] == 0 and said["sources"]["here"] == 40 << 20, (said, err)
        three.hostfile.write_text(json.dumps(entries))
        by_lan, by_cable = traffic(two, two.lan), traffic(two, two.cables[1])
        code, said, err = three.sync(str(origin), "--whole")
        assert code == 0 and said["direct"] == said["sources"]["hosts"] == 40 << 20, (said, err)
        assert said["notes"] == [] and traffic(two, two.cables[1]) - by_cable > size
        assert traffic(two, two.lan) - by_lan < size / 10
        shutil.rmtree(three.view(2))
        rated(one, one.cables[2], "50mbit")
        by_cable = traffic(two, two.cables[1])
        with ranks.single(
            three.command([*SYNC, str(origin), "--hostfile", str(three.hostfile), "--whole"]), env=three.env
        ) as running:
            while traffic(two, two.cables[1]) - by_cable < 4 << 20:
                assert running.process.poll() is None, running.err
                time.sleep(0.02)
            assert listening(one) == {one.lan, one.cables[2]}  # its sshd, and what it lends
            cut(one, two)
            assert running.wait(_PATIENCE_S) == 0, running.err
        assert running.err.count("no direct way from mini1 to mini2 (") == 1, running.err
        assert (three.view(2) / "model.safetensors").read_bytes() == (origin / "model.safetensors").read_bytes()


def listening(host: Host) -> set[str]:
    """Addresses at which somebody waits for connections."""
    shown = subprocess.run(host.command(["cat", "/proc/net/tcp"]), check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in shown.splitlines()[1:]]
    return {socket.inet_ntoa(bytes.fromhex(row[1][:8])[::-1]) for row in rows if row[3] == "0A"}


FLIP = """
import os, subprocess, sys, threading
child = subprocess.Popen([sys.executable, *sys.argv[2:]], stdin=subprocess.PIPE)
passed = 0
while data := bytearray(os.read(0, 1 << 16)):
    if passed <= 3_000_000 < passed + len(data) and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        data[3_000_000 - passed] ^= 1
    passed += len(data)
    child.stdin.write(data)
    child.stdin.flush()
child.stdin.close()
sys.exit(child.wait())
"""


def test_a_byte_that_flips_on_the_wire_and_a_host_that_is_gone(tmp_path: Path) -> None:
    """The one is sent again, the other is named, and doesn't keep the first from being filled, which is there thrice."""
    with bed(tmp_path, 3) as three:
        origin = tmp_path / "origin" / "model"
        folder_of_bytes(origin, 20 << 20)
        python = tmp_path / "python1"
        (tmp_path / "flip.py").write_text(FLIP)
        python.write_text(python.read_text().replace('"$@"\n', f'{tmp_path}/flip.py {tmp_path}/flipped "$@"\n'))
        entries = json.loads(three.hostfile.read_text())["hosts"]
        entries = [{**entry, "ips": []} for entry in (*entries, entries[1], {**entries[1], "ssh": "root@mini1"})]
        three.hostfile.write_text(json.dumps(entries))  # without addresses all goes by ssh
        three.cut_off(2)
        code, _, err = three.sync(str(origin), "--whole")
        assert code == 3 and re.fullmatch(
            r"error: mini2: ssh: connect to host .+; the same command goes on .+\n", err
        ), err
        assert (tmp_path / "flipped").exists()
        assert (three.view(1) / "model.safetensors").read_bytes() == (origin / "model.safetensors").read_bytes()
