"""hippo_mpi.cluster sync over ssh between namespaces: what each host gets, from where, through kills and damage."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from hippo_mpi.views.spans import num_bytes, spans_here
from tests import ranks
from tests.cabled_hosts import CAN_MAKE, SSHD, WHY_NOT, Host, cabled_hosts, reached_by_ssh
from tests.commands.test_hub import REPO, Hub

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not CAN_MAKE or not SSHD, reason=f"{WHY_NOT}; and sshd (openssh-server)"),
    pytest.mark.timeout(150),
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
        hidden = f"mount -t tmpfs tmpfs {self.folder / 'origin'}"  # hosts of one machine have other folders here
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
        command = [sys.executable, "-m", "hippo_mpi.cluster", "sync", model, "--hostfile", str(self.hostfile), "--json"]
        found = subprocess.run(
            self.command([*command, *options]),
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, **self.env},
        )
        return found.returncode, json.loads(found.stdout) if found.stdout else {}, found.stderr

    def view(self, number: int) -> Path:
        (found,) = (self.home(number) / "hippo_mpi").iterdir()
        return found

    def generate(self, model: str, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "hippo_mpi.run", "--hostfile", str(self.hostfile), "--model", model, "--json"]
        with ranks.single(self.command([*command, *options]), env=self.env) as running:
            assert running.wait() == 0, running.err
            found: dict[str, Any] = json.loads(running.out)
            return found


@contextlib.contextmanager
def bed(folder: Path, count: int = 2) -> Iterator[Bed]:
    (folder / "origin").mkdir(parents=True)
    with cabled_hosts(count, [], lan=True) as hosts, reached_by_ssh(hosts, folder) as env:
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


def test_a_repo_of_one_file(tmp_path: Path) -> None:
    """Each host has its own bytes, over the internet came each once; another split moves the difference."""
    total = copy_model(tmp_path / "repo")
    with bed(tmp_path, 3) as three:
        code, said, err = three.sync(REPO, "--layer-split", "4,4,4")
        assert code == 0, err
        print(said, err)
        heads = downloaded(tmp_path)
        print(total, heads)
        for number in range(3):
            held = spans_here(three.view(number) / "model.safetensors")
            print(number, num_bytes(held), held)
        found = three.generate(REPO, "--layer-split", "4,4,4")
        print(found)
        assert 0
