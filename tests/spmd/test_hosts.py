"""A server over two hosts that are reached by ssh, of which one is lost: on this machine, with an sshd for each."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hippo_mpi.config.bundled import BUNDLED_MODEL
from tests import ranks
from tests.servers import SERVE, server
from tests.spmd.test_recovery import NUM_STREAMS, answers

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/usr/local/sbin")
NAME, ADDRESS = "hippo-second-host", "127.0.0.2"
TIMEOUT_S = 12

pytestmark = [
    pytest.mark.skipif(SSHD is None or os.geteuid() != 0, reason="needs root and an sshd of its own (openssh-server)"),
    pytest.mark.skipif(os.uname().sysname != "Linux", reason="needs a second loopback address"),
]


@contextlib.contextmanager
def second_host(folder: Path) -> Iterator[tuple[dict[str, str], Path, subprocess.Popen[bytes]]]:
    """(environment in which ssh knows it, hostfile of this host and the second, its sshd)."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (port,) = ranks.free_ports(1)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    daemon = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", "/dev/null", "-h", folder / "host", "-p", str(port), "-o", f"ListenAddress={ADDRESS}",
         "-o", f"AuthorizedKeysFile={folder / 'authorized'}", "-o", "StrictModes=no", "-o", "PermitRootLogin=yes"],
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    config = folder / "config"
    config.write_text(
        f"Host {NAME}\n HostName {ADDRESS}\n Port {port}\n IdentityFile {folder / 'user'}\n"
        " StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
    wrapper.chmod(0o755)
    hostfile = folder / "hostfile"
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}, {"ssh": NAME, "ips": [ADDRESS]}]
    hostfile.write_text(json.dumps(hosts))
    try:
        while subprocess.run([wrapper, NAME, "true"], capture_output=True).returncode != 0:
            assert daemon.poll() is None, "sshd has ended"
            time.sleep(0.1)
        yield {"PATH": f"{wrapper.parent}:{ranks.BIN}:{os.environ['PATH']}"}, hostfile, daemon
    finally:
        lose(daemon)


def lose(daemon: subprocess.Popen[bytes]) -> None:
    """All that runs on the second host ends at once."""
    for pid in [daemon.pid, *ranks.descendants(daemon.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    daemon.wait()


def test_launch_run_reaches_a_host_through_ssh(tmp_path: Path) -> None:
    """Whose PATH knows nothing of our virtual environment."""
    options = ["--max-tokens", "30", "--timeout", str(TIMEOUT_S)]
    with ranks.single([str(ranks.BIN / "hippo_mpi.generate"), *options]) as alone:
        assert alone.wait() == 0, alone.err
    with second_host(tmp_path) as (env, hostfile, _):
        run = [str(ranks.BIN / "python"), "-m", "hippo_mpi.run", "--hostfile", str(hostfile), *options]
        with ranks.single(run, env=env, stdin=subprocess.PIPE) as running:
            assert running.wait() == 0, running.err
            assert running.out == alone.out


def test_the_key_is_on_no_command_line_and_in_no_file(tmp_path: Path) -> None:
    """Whatever ps shows of a run over two hosts, and of its ssh, no key is in it: it goes over ssh's standard input."""
    seen, keys, before = set[str](), set[bytes](), _key_files()
    with second_host(tmp_path) as (env, hostfile, _):
        run = [str(ranks.BIN / "python"), "-m", "hippo_mpi.run", "--hostfile", str(hostfile), "--max-tokens", "3"]
        with ranks.single(run, env={**env, "HOME": str(tmp_path)}, stdin=subprocess.PIPE) as running:
            while running.process.poll() is None:
                listing = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True).stdout
                seen.update(listing.splitlines())
                for pid in ranks.descendants(running.process.pid):
                    with contextlib.suppress(OSError):
                        keys |= set(re.findall(rb"HIPPO_RUN_KEY=(\w+)", Path(f"/proc/{pid}/environ").read_bytes()))
            assert running.wait() == 0, running.err
    (key,) = keys
    assert key.decode() not in " ".join(seen) and _key_files() == before


def _key_files() -> set[Path]:
    return set((Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache/hippo-mpi").glob("run-*"))


@pytest.mark.timeout(200)
def test_a_mistake_on_hosts_ends_the_start(tmp_path: Path) -> None:
    """mlx.launch's own status is always 0."""
    with second_host(tmp_path) as (env, hostfile, _):
        command = [SERVE, "--port", "0", "--hostfile", str(hostfile), "--layer-split", "1,2,3"]
        with ranks.single(command, env=env) as running:
            assert running.wait() == 2
            assert "error: layer split 1,2,3 is for 3 ranks, but there are 2" in running.err


@pytest.mark.timeout(200)
def test_answers_go_on_without_a_host_that_is_lost(tmp_path: Path) -> None:
    with second_host(tmp_path) as (env, hostfile, daemon):
        options = ("--hostfile", str(hostfile), "--timeout", str(TIMEOUT_S), "--layer-split", "7,5")
        with server("--model", str(BUNDLED_MODEL), *options, env=env) as running:
            assert [rank["layers"] for rank in running.status()["ranks"]] == [[0, 7], [7, 12]]
            wanted = answers(running)
            begun = threading.Barrier(NUM_STREAMS + 1)
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(answers, running, begun)
                begun.wait(60)
                lose(daemon)
                assert found.result(100) == wanted
            status = running.status()
            assert status["silent_hosts"] == [NAME]
            assert [rank["layers"] for rank in status["ranks"]] == [[0, 12]]


@pytest.mark.timeout(200)
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs ip (iproute2)")
def test_answers_go_on_without_a_host_whose_cable_is_pulled(tmp_path: Path) -> None:
    """It still lets us in, by ssh over another network; ranks were adding up."""
    tensor = ("--parallel", "tensor", "--tensor", "exact")
    address, pulled = ["10.99.77.2/32", "dev", "lo"], ["unreachable", "10.99.77.2/32"]
    subprocess.run(["ip", "addr", "add", *address], check=True)
    try:
        with second_host(tmp_path) as (env, hostfile, _):
            hosts = json.loads(hostfile.read_text())
            hosts[1]["ips"] = [address[0].partition("/")[0]]
            hostfile.write_text(json.dumps(hosts))
            with server("--hostfile", str(hostfile), "--timeout", str(TIMEOUT_S), *tensor, env=env) as running:
                running.await_ready()
                wanted = answers(running)
                begun = threading.Barrier(NUM_STREAMS + 1)
                with ThreadPoolExecutor(1) as pool:
                    found = pool.submit(answers, running, begun)
                    begun.wait(60)
                    subprocess.run(["ip", "addr", "del", *address], check=True)
                    subprocess.run(["ip", "route", "add", *pulled], check=True)
                    os.kill(max(pid for pid in running.rank_pids() if _is_rank(pid)), signal.SIGKILL)
                    assert found.result(150) == wanted
                assert running.status()["silent_hosts"] == [NAME]
    finally:
        for words in (["route", "del", *pulled], ["addr", "del", *address]):
            subprocess.run(["ip", *words], capture_output=True)


def _is_rank(pid: int) -> bool:
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    return b"MLX_RANK=" in environment and b"mlx.launch" not in Path(f"/proc/{pid}/cmdline").read_bytes()
